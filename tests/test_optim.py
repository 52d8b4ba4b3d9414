"""The optimizers: what Muon works on, that it does what its papers say, and that it can be stopped and taken up."""

import contextlib
import copy
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from omni.common.errors import UserError
from omni.train import optim
from omni.train.optim import Muon, OrthogonalUpdates, build_adamw, hidden_kernels, load_optimizer, orthogonalise


class Net(nn.Module):
    """A bit of everything: an embedding with a head that shares its kernel, convolutions, a norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.depthwise = nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.normed = weight_norm(nn.Conv1d(12, 8, 1))
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.normed(self.depthwise(self.conv(self.embed(tokens).mT))).mT
        return self.head(self.frozen(self.linear(self.norm(x))))


def train(net: Net, optimizer: Muon, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(net(tokens).mT, tokens.roll(1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def new_net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_muon_has_the_kernels_of_hidden_layers_and_adamw_the_rest():
    net = new_net()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert {names[id(kernel)] for kernel in hidden_kernels(net)} == {
        "conv.weight", "normed.parametrizations.weight.original1", "linear.weight"
    }  # fmt: skip
    groups = Muon(net, lr=1e-3, wd=0.1).param_groups
    optimized = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(optimized) == sorted(names[id(p)] for p in net.parameters() if p.requires_grad)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1, 0.1]


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_an_update_keeps_the_singular_vectors_and_evens_the_values(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    values = torch.logspace(-1, 0.5, min(shape))
    found = u.mT @ orthogonalise(u * values @ v, 5, OrthogonalUpdates.COEFFICIENTS) @ v.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.5 and values.max() < 1.3
    assert (found - torch.diag_embed(values)).abs().max() < 0.1


class NoBf16(TorchDispatchMode):
    """Refuses every operation on bf16."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16:
            raise AssertionError(f"{function} in bf16, which this hardware computes a hundred times slower")
        return result


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_used_where_the_hardware_computes_in_it_only(native, monkeypatch):
    monkeypatch.setattr(optim, "computes_in_bf16", lambda device: native)
    matrices = torch.randn(2, 16, 24)
    with NoBf16() if not native else contextlib.nullcontext():
        found = orthogonalise(matrices, 5, OrthogonalUpdates.COEFFICIENTS)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert found.dtype == torch.float32 and torch.linalg.svdvals(found).sub(0.95).abs().max() < 0.4
    assert (found - u @ v).abs().mean() < 0.1
    if native:
        with pytest.raises(AssertionError, match="in bf16"), NoBf16():
            orthogonalise(matrices, 5, OrthogonalUpdates.COEFFICIENTS)


@pytest.mark.loop
def test_no_stage_computes_in_bf16_on_other_hardware(stage, tmp_path):
    prelude = (
        "import torch, omni.train.device, omni.train.optim, test_optim\n"
        "for module in (omni.train.device, omni.train.optim):\n"
        "    module.computes_in_bf16 = lambda device: False\n"
        "test_optim.NoBf16().__enter__()\n"
    )
    keys = {"optimizer": "muon", "use_amp": True, "max_steps": 2, "num_workers": 0}
    stage.training(tmp_path, **keys).finish(prelude=prelude)


def test_equal_to_the_library_for_matrices():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(32, 48)), nn.Parameter(torch.randn(32, 48)), nn.Parameter(torch.randn(20, 8))]
    theirs = copy.deepcopy(ours)
    start = [p.detach().clone() for p in ours]
    optimizers = [
        OrthogonalUpdates(ours, lr=1e-2, wd=0.1),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(6):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, begun in zip(ours, theirs, start, strict=True):
        moved = (other - begun).norm()
        assert moved > 0.1 and (one - other).norm() < 0.02 * moved  # both work in bfloat16


def test_a_convolution_counts_as_a_matrix():
    torch.manual_seed(0)
    kernel, gradient = nn.Parameter(torch.randn(6, 4, 3)), torch.randn(6, 4, 3)
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad, matrix.grad = gradient, gradient.flatten(1)
    for parameter in (kernel, matrix):
        OrthogonalUpdates([parameter], lr=0.1, wd=0.0).step()
    assert torch.equal(kernel.flatten(1), matrix)


class OnDevice(torch.Tensor):
    """A number that the host would have to wait for."""

    is_cpu = False


@pytest.mark.parametrize("kind", [torch.Tensor, OnDevice])
@pytest.mark.parametrize("gradient", [float("nan"), float("inf"), 1.0])
def test_a_step_that_is_to_change_nothing_changes_nothing(gradient, kind):
    net = new_net()
    optimizer = Muon(net, lr=1e-2, wd=0.1)
    train(net, optimizer, range(3))
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(gradient)
    optimizer.found_inf = torch.ones(()).as_subclass(kind)
    optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    optimizer.found_inf = torch.zeros(())
    train(net, optimizer, range(3, 4))
    assert not torch.equal(net.linear.weight, weights["linear.weight"])


def test_taken_up_from_its_state_it_goes_on_with_the_same_bits(tmp_path):
    net = new_net()
    optimizer = Muon(net, lr=1e-2, wd=0.1)
    train(net, optimizer, range(4))
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(net, optimizer, range(4, 8))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Net()
    resumed.load_state_dict(saved["net"])
    optimizer = Muon(resumed, lr=1e-2, wd=0.1)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(4, 8))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in net.state_dict().items())


GAINS_BIASES_AND_POSITIONS = re.compile(r"bias|norm|scale|original0|cls|position|levels|\.start$")


def test_weight_decay_is_on_kernels_and_embeddings_only(stage, tmp_path, monkeypatch):
    """Of every stage's modules, as its script sets them up: by their names, which are the field's."""
    training = stage.training(tmp_path, wd=0.1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(training.config))
    script = importlib.import_module(stage.script.removesuffix(".py"))
    seen = []
    monkeypatch.setattr(script, "train", lambda run, phases, *_, **__: seen.extend(phases) or {})
    with contextlib.suppress(UserError):  # stage D's next part wants what this one would have trained
        script.main(["--config", str(path), "--device", "cpu"])
    assert seen
    for phase in seen:
        names = {id(parameter): name for name, parameter in phase.module.named_parameters()}
        for group in phase.optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                left_alone = bool(GAINS_BIASES_AND_POSITIONS.search(name)) or parameter.ndim < 2
                assert group["weight_decay"] == (0.0 if left_alone else 0.1), name


def test_a_state_of_other_groups_is_refused_in_one_line():
    net = new_net()
    other = copy.deepcopy(net)
    other.linear.no_decay = ("weight",)  # as if another version had decided otherwise
    state = build_adamw(other, lr=1e-3, wd=0.1).state_dict()
    with pytest.raises(UserError, match="^run/x_step_3.pt: its optimizer has other groups of parameters"):
        load_optimizer(build_adamw(net, lr=1e-3, wd=0.1), state, Path("run/x_step_3.pt"))
