"""Tasks from files and live modules: attributes, references, messages about what is broken."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ke_gym.errors import UserError
from ke_gym.tasks import Task, resolve
from ke_gym.tasks.reference import plain_tensors

KERNELBENCH = Path(__file__).parent / "kernelbench"
problem = pytest.mark.parametrize("path", sorted(KERNELBENCH.glob("*.py")), ids=lambda path: path.stem)

PLAIN = """
import torch
import torch.nn as nn
N = 8
class Model(nn.Module):
    def forward(self, x):
        return x * 2
def get_inputs():
    return [torch.randn(N)]
"""


def write(folder: Path, text: str, name: str = "problem.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# KernelBench files, read unchanged


@problem
def test_kernelbench_files_run_unchanged(path):
    task = Task.load(path)
    assert task.name == path.stem and task.contract() == task.contract("cuda") == "default"
    reference = task.reference()
    arguments = task.inputs(seed=1)
    outputs, exact = reference(*arguments), reference.double()(*arguments)
    for output, oracle in zip(outputs, exact, strict=True):
        assert oracle.dtype == torch.float64
        torch.testing.assert_close(output.double(), oracle, rtol=1e-4, atol=1e-5)


@problem
def test_a_call_leaves_no_trace(path):
    task = Task.load(path)
    reference = task.reference()
    arguments = task.inputs(seed=2)
    state = {name: tensor.clone() for name, tensor in reference.state.items()}
    attributes = set(vars(reference.module))
    first = reference(*arguments)
    reference(*task.inputs(seed=3))
    assert all(torch.equal(a, b) for a, b in zip(first, reference(*arguments), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in reference.state.items())
    assert set(vars(reference.module)) == attributes


def test_batchnorm_keeps_training_mode_and_its_running_statistics():
    reference = Task.load(KERNELBENCH / "2_conv_batchnorm_relu.py").reference()
    assert reference.module.training
    assert list(reference.state) == [
        "conv_weight", "conv_bias", "bn_weight", "bn_bias",
        "bn_running_mean", "bn_running_var", "bn_num_batches_tracked",
    ]  # fmt: skip
    assert reference.state["bn_num_batches_tracked"] == 0
    reference.randomize(1)
    assert (reference.state["bn_running_var"] > 0).all() and reference.state["bn_bias"].all()


def test_models_are_seeded_as_kernelbench_seeds_them():
    task = Task.load(KERNELBENCH / "5_mlp_init_args.py")
    torch.manual_seed(42)
    expected = type(task.reference().module)(*task.init_inputs())
    found = task.reference(seed=42).module
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_outputs_are_flattened_and_plain_inputs_kept():
    assert len(Task.load(KERNELBENCH / "3_dict_output.py").reference()(torch.ones(2, 3))) == 3
    tensor, factor, power = Task.load(KERNELBENCH / "4_matrix_scalar.py").inputs()
    assert tensor.shape == (64, 16) and (factor, power) == (3.14, 2)
    assert type(power) is int


# Attributes and shape sets


def test_shape_sets_override_globals_separately(tmp_path):
    text = PLAIN + 'shapes = {"cpu": {"N": 3}, "gpu": {"N": 4}, "small": {"N": 1}, "ragged_odd": {"N": 5}}\n'
    task = Task.load(write(tmp_path, text))
    assert [task.inputs(name)[0].numel() for name in ("cpu", "default", "ragged_odd", "gpu")] == [3, 8, 5, 4]
    assert task.public_shapes() == ("cpu", "small") and task.public_shapes("hip") == ("gpu", "small")
    assert task.hidden_shapes() == ("ragged_odd",)
    with pytest.raises(UserError, match="task problem has no shape set 'huge'; it has default, cpu, gpu"):
        task.inputs("huge")


def test_the_id_is_of_the_content(tmp_path):
    first = Task.load(write(tmp_path, PLAIN, "a.py"))
    assert first.id == Task.load(write(tmp_path, PLAIN, "b.py")).id
    assert first.id != Task.load(write(tmp_path, PLAIN + "precision = 'bf16'\n", "c.py")).id
    assert first.id == Task.from_bytes(first.to_bytes()).id
    assert Task.from_bytes(first.to_bytes()) == first


def test_files_may_use_dataclasses_and_postponed_annotations(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + PLAIN
    task = Task.load(write(tmp_path, text + "@dataclass\nclass Config:\n    size: int = 3\n"))
    assert task.reference()(torch.ones(2))[0].tolist() == [2, 2]


# Backward


def test_backward_returns_outputs_then_gradients(tmp_path):
    text = """
import torch
import torch.nn as nn
import torch.nn.functional as F
backward = True
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.unused = nn.Parameter(torch.randn(2))
    def forward(self, x, index, y):
        return F.linear(x, self.weight)[index] * y, index + 1
def get_inputs():
    return [torch.randn(5, 6), torch.randint(0, 5, (7,)), torch.randn(7, 4)]
"""
    task = Task.load(write(tmp_path, text))
    reference, arguments = task.reference(), task.inputs(seed=4)
    assert [tuple(t.shape) for t in arguments] == [(5, 6), (7,), (7, 4), (7, 4)]
    results = reference(*arguments)
    assert [tuple(t.shape) for t in results] == [(7, 4), (7,), (5, 6), (7, 4), (4, 6), (2,)]
    assert not any(t.requires_grad for t in results) and not results[-1].any()
    wide = reference.double()
    x, index, y, grad = arguments
    weight = wide.state["weight"]

    def forward(x, y, weight):
        return torch.nn.functional.linear(x, weight)[index] * y

    leaves = [t.double().requires_grad_() for t in (x, y, weight)]
    assert torch.autograd.gradcheck(forward, leaves)
    expected = torch.autograd.grad(forward(*leaves), leaves, grad.double())
    for found, wanted in zip(wide(*arguments)[2:5], expected, strict=True):
        torch.testing.assert_close(found, wanted)


# The float64 oracle


def test_the_oracle_does_not_round_where_the_file_casts(tmp_path):
    text = """
import torch
import torch.nn as nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.randn(4, 4)
    def forward(self, x):
        low = x.to(torch.bfloat16).half().float() + torch.zeros(4, dtype=torch.float32)
        return (low @ self.table @ torch.ones(4, 4)).to(torch.float16)
def get_inputs():
    return [torch.randn(4, 4, dtype=torch.bfloat16)]
"""
    task = Task.load(write(tmp_path, text))
    reference, (x,) = task.reference(), task.inputs()
    (exact,) = reference.double()(x)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, x.double() @ reference.module.table.double() @ torch.ones(4, 4).double())
    assert reference(x)[0].dtype == torch.float16 and torch.get_default_dtype() == torch.float32


def test_randomize_replaces_constants_and_is_repeatable():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 1))
    nn.init.zeros_(module[0].bias)
    reference = Task.from_module(module, torch.randn(3, 6)).reference()
    assert "_0_weight" in reference.state and "_1_running_var" in reference.state
    reference.randomize(8)
    values = {name: tensor.clone() for name, tensor in reference.state.items()}
    assert values["_0_bias"].unique().numel() == 4 and values["_1_weight"].unique().numel() == 4
    assert (values["_1_running_var"] > 0).all() and values["_1_running_mean"].abs().sum() > 0
    reference.randomize(9)
    assert not torch.equal(reference.state["_0_weight"], values["_0_weight"])
    reference.randomize(8)
    assert all(torch.equal(values[name], tensor) for name, tensor in reference.state.items())


# Live modules


def test_a_live_module_keeps_its_weights_and_gets_inputs_like_the_example():
    module = nn.Linear(6, 4)
    example = 3 + 0.5 * torch.randn(200, 6)
    task = Task.from_module(module, (example,), name="projection")
    assert task.name == "projection" and task.contract("cuda") == "default"
    nn.init.zeros_(module.weight)  # the task has its own copy
    (x,) = task.inputs(seed=1)
    assert x.mean() == pytest.approx(3, abs=0.1) and x.std() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(x, task.inputs(seed=2)[0])
    copied = Task.from_bytes(task.to_bytes())
    assert copied.id == task.id
    assert torch.equal(copied.reference()(x)[0], task.reference()(x)[0])
    assert task.reference().state["weight"].abs().sum() > 0


def test_a_live_module_travels_to_a_process_that_cannot_import_it(tmp_path, monkeypatch):
    text = """
from torch import nn
OFFSET = 7
class Net(nn.Module):
    def forward(self, x, i, k):
        return x[i] * k + OFFSET
"""
    write(tmp_path, text, "their_network.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    net = importlib.import_module("their_network").Net()
    index = torch.tensor([1, 0, 1])
    task = Task.from_module(net, [torch.randn(2, 3), index, 2.0])
    assert "class Net" in task.source and "OFFSET" in task.source
    assert torch.equal(task.inputs(seed=5)[1], index) and task.inputs(seed=5)[2] == 2.0
    (tmp_path / "task.bin").write_bytes(task.to_bytes())
    program = (
        "import sys; from pathlib import Path; from ke_gym.tasks import Task\n"
        "t = Task.from_bytes(Path(sys.argv[1]).read_bytes())\n"
        "print(t.reference()(*t.inputs(seed=3))[0].double().sum().item())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "task.bin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(told) == task.reference()(*task.inputs(seed=3))[0].double().sum().item()


@pytest.mark.parametrize(
    "module, example, message",
    [
        (lambda x: x, torch.ones(1), "expected a torch.nn.Module, got function"),
        (nn.ReLU(), {"x": torch.ones(1)}, "example_inputs must be a tensor or a sequence"),
        (nn.ReLU(), (), "example_inputs must be a tensor or a sequence"),
    ],
)
def test_what_from_module_refuses(module, example, message):
    with pytest.raises(UserError, match=message):
        Task.from_module(module, example)


# Finding tasks, and messages


def test_resolve_takes_names_families_files_and_folders(tmp_path):
    assert [task.name for task in resolve("softmax")] and {t.family for t in resolve("softmax")} == {
        "softmax"
    }
    assert Task.load("rms_norm").family == "norm"
    assert [task.name for task in resolve(KERNELBENCH)] == [p.stem for p in sorted(KERNELBENCH.glob("*.py"))]
    assert resolve(str(write(tmp_path, PLAIN)))[0].family == "user"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("rmsnorm", "no task, family, file or folder is called rmsnorm; did you mean rms_norm"),
        ("zzzzzzzz", "called zzzzzzzz; `scripts/tasks.py list` prints the names"),
        ("missing/problem.py", "called missing/problem.py"),
    ],
)
def test_unknown_names(spec, message):
    with pytest.raises(UserError, match=message):
        resolve(spec)


def test_load_wants_one_task(tmp_path):
    with pytest.raises(UserError, match=r"norm names \d+ tasks \(.*\); choose one of them"):
        Task.load("norm")
    with pytest.raises(UserError, match="holds no task files"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("import torch\ndef get_inputs(:\n", 2, "invalid syntax"),
        (
            "import torch\n\nx = 1 / 0\n",
            3,
            "running the file failed with ZeroDivisionError: division by zero",
        ),
        ("import torch\nimport no_such_thing\n", 2, "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def get_inputs():\n    return []\n", 1, "no Model found"),
        (PLAIN.replace("def get_inputs", "def inputs"), 1, "no get_inputs found"),
        (PLAIN + "precision = 'fp8'\n", 10, "precision = 'fp8' is not one of"),
        (PLAIN + "tolerance = -1\n", 10, "tolerance = -1 is not a number between 0 and 1"),
        (
            PLAIN + "shapes = {'cpu': {'M': 3}}\n",
            10,
            "shape set 'cpu' sets M, which is no global of the file",
        ),
        (PLAIN + "shapes = [3]\n", 10, "is not a dict like"),
        (PLAIN + "backward = 1\n", 10, "backward = 1 is not True or False"),
        (PLAIN + "shapes = {'cpu': {1: 2}}\n", 10, "is not a dict like"),
        (PLAIN + "__doc__ = 5\n", 10, "__doc__ = 5 is not a text"),
        ("import sys\nsys.exit(0)\n", 2, "running the file failed with SystemExit: 0"),
    ],
)
def test_broken_files_are_named_by_line(tmp_path, text, line, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        Task.load(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and message in str(caught.value)


def test_code_that_breaks_later_is_named_too(tmp_path):
    path = write(tmp_path, PLAIN.replace("[torch.randn(N)]", "[torch.randn(N) @ torch.ones(3)]"))
    with pytest.raises(UserError, match=rf"{path}:9: get_inputs failed with RuntimeError"):
        Task.load(path).inputs()
    path = write(tmp_path, PLAIN.replace("x * 2", "x @ torch.ones(3)"), "other.py")
    with pytest.raises(UserError, match=rf"{path}:7: the forward pass failed with RuntimeError"):
        Task.load(path).reference()(torch.ones(2))
    path = write(tmp_path, PLAIN + "def get_init_inputs():\n    return [1]\n", "third.py")
    with pytest.raises(UserError, match=rf"{path}:1: building Model failed with TypeError"):
        Task.load(path).reference()
    path = write(tmp_path, PLAIN.replace("(nn.Module)", ""), "fourth.py")
    with pytest.raises(UserError, match=r"Model is not a torch.nn.Module"):
        Task.load(path).reference()
    path = write(tmp_path, PLAIN.replace("return x * 2", "return None"), "fifth.py")
    with pytest.raises(UserError, match=rf"{path}: the forward returns no tensor"):
        Task.load(path).reference()(torch.ones(2))


F8 = "torch.float8_e4m3fn"


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (
            f"[torch.randn(N), torch.randn(N).to({F8})]",
            "input 1 has the dtype float8_e4m3fn, .*float32, .*bool",
        ),
        ("[torch.ones(N, dtype=torch.uint16)]", "input 0 has the dtype uint16, "),
        ("[[torch.randn(N), 2]]", "input 0 is a list that holds tensors; pass them as inputs of their own"),
        ("[2, {'x': torch.randn(N)}]", "input 1 is a dict that holds tensors; pass them"),
        ("{'x': torch.randn(N)}", "get_inputs returns a dict; return a list"),
    ],
)
def test_inputs_that_no_kernel_is_given_are_refused(tmp_path, inputs, said):
    path = write(tmp_path, PLAIN.replace("[torch.randn(N)]", inputs))
    with pytest.raises(UserError, match=rf"{path}: {said}"):
        Task.load(path).inputs()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            f"    def forward(self, x):\n        return x, x.to({F8})\n",
            "output 1 has the dtype float8_e4m3fn",
        ),
        (
            "    def __init__(self):\n        super().__init__()\n"
            "        self.register_buffer('w', torch.ones(3, dtype=torch.uint16))\n"
            "    def forward(self, x):\n        return x\n",
            "w has the dtype uint16",
        ),
    ],
)
def test_dtypes_of_outputs_and_state_are_checked_too(tmp_path, body, said):
    path = write(tmp_path, PLAIN.replace("    def forward(self, x):\n        return x * 2\n", body))
    with pytest.raises(UserError, match=rf"{path}: {said}"):
        Task.load(path).reference()(torch.ones(2))


def test_plain_lists_and_a_byte_order_mark_are_fine(tmp_path):
    path = tmp_path / "marked.py"
    path.write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("[torch.randn(N)]", "[torch.randn(N), [1, 2]]").encode())
    assert Task.load(path).inputs()[1] == [1, 2]


def test_what_is_no_parameter_has_the_same_values_on_every_device(tmp_path: Path) -> None:
    path = tmp_path / "noisy.py"
    path.write_text(
        "import torch\nclass Model(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layer = torch.nn.Linear(8, 8)\n        self.noise = torch.rand(8, device='cpu')\n"
        "        self.weight = self.layer.weight\n"
        "    def forward(self, x):\n        return self.layer(x) + self.noise\n"
        "def get_inputs():\n    return [torch.randn(4, 8)]\n"
    )
    task = Task.from_file(path)
    here, there = task.reference().module, task.reference(device="meta").module
    assert [name for _, name in plain_tensors(here)] == ["noise"]
    assert there.layer.weight.device.type == "meta" and torch.equal(here.noise, there.noise)
