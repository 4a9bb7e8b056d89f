"""Makes steps.json and groups.json: ten steps of each optimizer, and the groups of weights, by their owners' code.

    python make.py LLAMA_FACTORY AXOLOTL AXOLOTL_CONTRIBS_MIT

The arguments are folders with the sources of LLaMA-Factory and Axolotl and of the package axolotl-contribs-mit (0.0.6). Needs
torch, transformers, peft and lion_pytorch. Muon's iterations run in float32 in place of bfloat16, as Muster's do.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch

HERE = Path(__file__).parent
STEPS, RATE = 10, 0.01
SHAPES = {
    "model.embed_tokens.weight": (6, 3),
    "model.layers.0.mlp.up_proj.weight": (5, 3),
    "model.layers.0.self_attn.q_proj.weight": (3, 7),
    "model.norm.weight": (4,),
}

torch.compile = lambda function: function
torch.Tensor.bfloat16 = torch.Tensor.float


def module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def stub(name, **members):
    sys.modules[name] = types.SimpleNamespace(**members)


def parameters():
    torch.manual_seed(1)
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def gradients():
    torch.manual_seed(2)
    return [{name: torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]


def is_decayed(name):
    return len(SHAPES[name]) == 2


def decay_groups(named, weight_decay):
    """The groups of Transformers' trainer."""
    return [
        {"params": [p for n, p in named.items() if is_decayed(n)], "weight_decay": weight_decay},
        {"params": [p for n, p in named.items() if not is_decayed(n)], "weight_decay": 0.0},
    ]


def flat(tensors):
    return [x for name in SHAPES for x in tensors[name].detach().flatten().tolist()]


def run(make):
    named = parameters()
    optimizer = make(named)
    for step, grads in enumerate(gradients()):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        for name, parameter in named.items():
            parameter.grad = grads[name].clone()
        optimizer.step()
    return flat(named)


def cases(llama_factory, contribs):
    from lion_pytorch import Lion

    def sgd(**settings):
        return lambda named: torch.optim.SGD(decay_groups(named, 0.1), lr=RATE, **settings)

    def sgd_case(momentum=0.0, dampening=0.0, nesterov=False):
        made = run(sgd(momentum=momentum, dampening=dampening, nesterov=nesterov))
        rule = {"sgd": {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}}
        return rule, 0.9, 0.999, made

    yield sgd_case()
    yield sgd_case(momentum=0.9)
    yield sgd_case(momentum=0.9, dampening=0.3)
    yield sgd_case(momentum=0.8, nesterov=True)
    for betas in [(0.9, 0.99), (0.95, 0.98)]:
        made = run(lambda named: Lion(decay_groups(named, 0.1), lr=RATE, betas=betas))
        yield "lion", *betas, made
    made = run(lambda named: torch.optim.AdamW(decay_groups(named, 0.1), lr=RATE, betas=(0.9, 0.95), eps=1e-8))
    yield "adamw", 0.9, 0.95, made

    own = module(llama_factory / "src/llamafactory/third_party/muon/muon.py", "muon_of_llama_factory").Muon

    def of_llama_factory(named):
        muon = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        others = [p for n, p in named.items() if not (p.ndim == 2 and "embed" not in n and "lm_head" not in n)]
        return own(lr=RATE, wd=0.1, muon_params=muon, adamw_params=others, adamw_betas=(0.9, 0.999), adamw_eps=1e-8)

    yield {"muon": {"trains_vectors": True}}, 0.9, 0.999, run(of_llama_factory)

    stub("axolotl.integrations.base", BaseOptimizerFactory=object)
    factory = module(contribs / "src/axolotl/contribs/mit/muon/muon.py", "muon_of_axolotl").MuonOptimizerFactory

    def of_axolotl(named):
        model = types.SimpleNamespace(named_parameters=named.items)
        return factory()(model, None, lr=RATE, weight_decay=0.1)

    yield {"muon": {"trains_vectors": False}}, 0.95, 0.95, run(of_axolotl)


def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=32, tie_word_embeddings=False)
    return LlamaForCausalLM(config)


def adapted_model():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(small_model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"]))


def told(model, groups):
    """Rate and decay of each trained tensor, under the names that an adapter has on disk."""
    names = {id(p): n.replace(".default.weight", ".weight") for n, p in model.named_parameters() if p.requires_grad}
    tensors = {}
    for group in groups:
        for p in group["params"]:
            tensors[names[id(p)]] = [list(p.shape), group["lr"], group["weight_decay"]]
    return tensors


def groups(axolotl):
    from peft.optimizers import create_loraplus_optimizer

    model = adapted_model()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0,
                                          loraplus_weight_decay=0.1)
    yield {"lora_plus": {"ratio": 16.0}}, told(model, optimizer.param_groups)

    stub("axolotl.utils.logging", get_logger=lambda name: None)
    mixin = module(axolotl / "src/axolotl/core/trainers/mixins/optimizer.py", "optimizer_of_axolotl").OptimizerMixin
    written = [
        {"name": "output", "modules": ["o_proj", "layers.1.mlp.down_proj"], "lr": 5e-5},
        {"name": "first", "modules": ["layers.0", "lora_A.default"], "lr": 3e-4},
    ]
    for model in [small_model(), adapted_model()]:
        for embedding_lr, scale, lr_groups in [(2e-5, None, None), (None, 0.5, written), (None, None, written)]:
            trainer = mixin.__new__(mixin)
            trainer.args = types.SimpleNamespace(lr_groups=lr_groups, weight_decay=0.1, embedding_lr=embedding_lr,
                                                 embedding_lr_scale=scale)
            made = trainer.create_optimizer_grouped_parameters(model, {"lr": 1e-4})
            embedding = 1e-4 * scale if scale else embedding_lr
            yield {"named": {"embedding": embedding, "groups": lr_groups or []}}, told(model, made)


def main():
    llama_factory, axolotl, contribs = map(Path, sys.argv[1:4])
    steps = {
        "shapes": [[name, list(shape)] for name, shape in SHAPES.items()],
        "weights": flat(parameters()),
        "gradients": [flat(grads) for grads in gradients()],
        "rate": RATE,
        "cases": [
            {"optimizer": rule, "beta1": beta1, "beta2": beta2, "weights": made}
            for rule, beta1, beta2, made in cases(llama_factory, contribs)
        ],
    }
    (HERE / "steps.json").write_text(json.dumps(steps) + "\n")
    rates = [{"rates": rates, "tensors": tensors} for rates, tensors in groups(axolotl)]
    (HERE / "groups.json").write_text(json.dumps(rates) + "\n")


main()
