"""`scripts/onednn.py` computes the products of a process by oneDNN, and they are those of torch in full precision."""

import onednn
import pytest
import torch
from helpers import assert_near
from running import PYTHON, ROOT, launch
from torch import nn

SHAPES = [(70, 50, 30), (1, 50, 30), (70, 50, 1)]


def matrix(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


@pytest.fixture
def calls(monkeypatch):
    seen, linear = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(onednn, "LARGE", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: seen.append(args) or linear(*args))
    return seen


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_has_full_precision(shape, transposed, calls):
    rows, inner, columns = shape
    left = matrix(inner, rows).T if transposed[0] else matrix(rows, inner)
    right = matrix(columns, inner).T if transposed[1] else matrix(inner, columns)
    assert_near([onednn.matmul(left, right).double()], [left.double() @ right.double()], 1e-5)
    assert len(calls) == 1


def test_what_onednn_does_not_suit_is_left_to_torch(calls, monkeypatch):
    left, right = matrix(70, 50), matrix(50, 30)
    for dtype in (torch.float64, torch.bfloat16):
        torch.testing.assert_close(onednn.matmul(left.to(dtype), right.to(dtype)), left.to(dtype) @ right.to(dtype))
    monkeypatch.setattr(onednn, "LARGE", 70 * 50 * 30 + 1)
    torch.testing.assert_close(onednn.matmul(left, right), left @ right)
    assert not calls


EVERYWHERE = """
import sys
sys.path.insert(0, sys.argv[4])
import onednn, torch
from torch import nn

seen, linear = [], torch.ops.mkldnn._linear_pointwise
torch.ops.mkldnn._linear_pointwise = lambda *args: seen.append(args) or linear(*args)
onednn.cpu_name, onednn.LARGE = lambda: sys.argv[1], int(sys.argv[2])
onednn.use_everywhere()
torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 24, bias=False)), torch.randn(2, 30, 48)
model(x).square().sum().backward()
twice = torch.addmm(torch.ones(3, 3), torch.ones(3, 4), torch.ones(4, 3), beta=0.5, alpha=2)
with torch.autocast("cpu"):
    rounded = model(x).detach()
torch.save([*(p.grad for p in model.parameters()), twice, rounded.float(), len(seen)], sys.argv[3])
"""


@pytest.mark.parametrize(("name", "large", "products"), [("AMD", 0, 5), ("AMD", 2**40, 0), ("Intel", 0, 0)])
def test_all_products_of_a_process(name, large, products, tmp_path):
    path = tmp_path / "found.pt"
    done = launch(*PYTHON, "-W", "error", "-c", EVERYWHERE, name, large, path, ROOT / "scripts")
    assert done.returncode == 0, done.stderr
    *found, count = torch.load(path)
    assert count == (products if torch.backends.mkl.is_available() else 0)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 24, bias=False)), torch.randn(2, 30, 48)
    model.double()(x.double()).square().sum().backward()
    assert_near([grad.double() for grad in found[:-2]], [p.grad for p in model.parameters()], 1e-5)
    assert torch.equal(found[-2], torch.full((3, 3), 8.5))
    with torch.autocast("cpu"):
        torch.testing.assert_close(found[-1], model.float()(x).float())
