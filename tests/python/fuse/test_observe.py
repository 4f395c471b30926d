"""Trial runs of a model leave nothing behind."""

import pytest
import torch
from torch import nn

import ipex_llm
from ipex_llm.fuse.trace import preserved

transformers = pytest.importorskip("transformers")


class Installs(nn.Module):
    """Adds a hook to its child when it is first called, and remembers that it did."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(4, 4)

    def forward(self, x):
        if not getattr(self, "installed", False):
            self.installed = True
            self.child.register_forward_hook(lambda module, args, out: out + 1)
        return self.child(x)


def test_hooks_that_a_trial_run_installed_go_with_their_note():
    model, x = Installs(), torch.randn(2, 4)
    with preserved(model):
        model(x)
    assert not model.child._forward_hooks
    assert not hasattr(model, "installed")
    assert torch.equal(model(x), nn.functional.linear(x, model.child.weight, model.child.bias) + 1)


def test_hidden_states_are_collected_once():
    """transformers installs its collecting hooks at the first call that asks for hidden states."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=99, output_hidden_states=True,
    )  # fmt: skip
    ids = torch.arange(3, 13).reshape(1, 10)
    model = transformers.LlamaForCausalLM(config).eval()
    count = len(transformers.LlamaForCausalLM(config).eval()(ids).hidden_states)
    ipex_llm.optimize_model(model)
    with torch.no_grad():
        assert len(model(ids).hidden_states) == count == 3
