"""Makes losses.json: losses of tokens and the gradients of their logits, by the code of those whose losses they are.

    python make_losses.py LLAMA_FACTORY AXOLOTL TRL

The arguments are folders with the sources. Needs torch and transformers.
"""

import ast
import functools
import json
import sys
import types
from pathlib import Path
from typing import Optional

import torch
from transformers.trainer_pt_utils import LabelSmoother

ROWS, WIDTH = 6, 37


def functions(path, *names, **scope):
    """The functions of these names in a source file, without what else it imports."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    scope |= {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "Optional": Optional}
    exec(compile(tree, str(path), "exec"), scope)
    return [scope[name] for name in names]


def cases(llama_factory, axolotl, trl):
    dft, eaft = functions(llama_factory / "src/llamafactory/train/trainer_utils.py", "_dft_cross_entropy",
                          "_eaft_cross_entropy")
    [eaft_of_axolotl] = functions(axolotl / "src/axolotl/monkeypatch/loss/eaft.py", "eaft_loss")
    [log_softmax] = functions(trl / "trl/trainer/utils.py", "selective_log_softmax")
    [dft_of_trl] = functions(trl / "trl/trainer/sft_trainer.py", "dft_loss", selective_log_softmax=log_softmax)

    def rows(function):
        """A function of rows and their targets."""
        return lambda logits, targets: function(logits[:-1], targets)

    def sequence(function):
        """A function of a sequence, whose tokens are predicted by the rows before them."""
        def loss(logits, targets):
            labels = torch.cat([torch.tensor([0]), targets])[None]
            return function(types.SimpleNamespace(logits=logits[None]), labels)
        return loss

    yield "torch", "cross_entropy", rows(functools.partial(torch.nn.functional.cross_entropy, reduction="sum"))
    yield "LLaMA-Factory", "dft", rows(functools.partial(dft, num_items_in_batch=1))
    yield "TRL", "dft", sequence(functools.partial(dft_of_trl, num_items_in_batch=torch.tensor(1)))
    for alpha in [1.0, 0.5]:
        loss = rows(functools.partial(eaft, num_items_in_batch=1, alpha=alpha))
        yield "LLaMA-Factory", {"eaft": {"alpha": alpha, "k": 20, "divisor": 3.0}}, loss
    for alpha, k in [(1.0, 20), (2.0, 5)]:
        loss = sequence(functools.partial(eaft_of_axolotl, num_items_in_batch=1, alpha=alpha, k=k))
        yield "Axolotl", {"eaft": {"alpha": alpha, "k": k, "divisor": 1.0}}, loss
    for share in [0.1, 0.4]:
        def smoothed(outputs, labels, share=share):
            # The mean over the tokens.
            return ROWS * LabelSmoother(epsilon=share)({"logits": outputs.logits}, labels, shift_labels=True)
        yield "Transformers", {"smoothed": {"share": share}}, sequence(smoothed)


def main():
    torch.manual_seed(3)
    # The last row predicts nothing.
    logits = torch.randn(ROWS + 1, WIDTH) * torch.linspace(0.1, 6, ROWS + 1)[:, None]
    targets = torch.randint(0, WIDTH, (ROWS,))
    made = []
    for owner, loss, function in cases(*map(Path, sys.argv[1:4])):
        own = logits.clone().requires_grad_()
        total = function(own, targets)
        total.backward()
        gradient = own.grad[:-1].flatten().tolist()
        made.append({"name": f"{owner}: {loss}", "loss": loss, "sum": total.item(), "gradient": gradient})
    golden = {"width": WIDTH, "targets": targets.tolist(), "logits": logits[:-1].flatten().tolist(), "cases": made}
    (Path(__file__).parent / "losses.json").write_text(json.dumps(golden) + "\n")


main()
