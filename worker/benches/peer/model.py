"""Writes a model of random weights in a shape: bfloat16, as models are published. Downloads nothing."""

import argparse
import json


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the model's config.json")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with open(args.config) as file:
        values = json.load(file)
    theta = values.pop("rope_theta")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**values, rope_parameters={"rope_type": "default", "rope_theta": theta}))
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
