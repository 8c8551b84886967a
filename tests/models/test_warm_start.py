"""A shipped file back into its net: the net answers as the file does, and its norms can learn on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

from ai_edge_litert.interpreter import Interpreter  # noqa: E402

from agent.analysis.preprocessing import Relook  # noqa: E402
from agent.camera.simulated import render_training_crop  # noqa: E402
from agent.inference.manifest import load_manifest  # noqa: E402
from models.common import warm_start  # noqa: E402
from models.common.warm_start import FileDoesNotFit, load_shipped, read_layers  # noqa: E402
from models.nets import cellnet  # noqa: E402
from models.nets.cellnet import CellNet  # noqa: E402

pytestmark = pytest.mark.train

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Simulated cells of all classes as the classifier meets them, (48, 3, side, side), 0 to 1."""
    rng = np.random.default_rng(3)
    entry = load_manifest(MODELS).classifier
    look = entry.crop.as_look()
    assert look is not None
    names, side_px = (entry.classes[k % len(entry.classes)] for k in range(48)), entry.input.shape[1]
    drawn = (render_training_crop(rng, name, side_px)[..., ::-1] for name in names)
    crops = [Relook.of(crop, look).cell(crop, 0.5)[..., ::-1] for crop in map(np.ascontiguousarray, drawn)]
    return torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy()).float() / 255


def shipped_net() -> tuple[CellNet, Path]:
    entry = load_manifest(MODELS).classifier
    assert entry.morphology is not None
    sizes = [len(values) for values in entry.morphology.attributes.values()]
    return CellNet(entry.name, len(entry.classes), sizes), MODELS / entry.file


def answers_of_file(file: Path, pictures: torch.Tensor) -> np.ndarray:
    """Class logits (n, classes) of the int8 file."""
    entry = load_manifest(MODELS).classifier
    (logits,) = [output for output in entry.outputs if output.kind == "class_logits"]
    interpreter = Interpreter(str(file))
    interpreter.allocate_tensors()
    place = interpreter.get_input_details()[0]["index"]
    (found,) = [d for d in interpreter.get_output_details() if d["name"] == logits.name]
    rows = []
    for picture in pictures:
        stored = (picture.permute(1, 2, 0)[None].numpy() * 255).round() - 128
        interpreter.set_tensor(place, stored.astype(np.int8))
        interpreter.invoke()
        rows.append((interpreter.get_tensor(found["index"])[0].astype(float) - logits.zero_point) * logits.scale)
    return np.array(rows)


@pytest.mark.parametrize("has_norms", [True, False])
def test_the_net_answers_as_its_file_does(
    pictures: torch.Tensor, has_norms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, file = shipped_net()
    if not has_norms:
        monkeypatch.setattr(warm_start, "norms_file", lambda _path: Path("nowhere"))
    load_shipped(net, file, pictures.split(16))
    with torch.no_grad():
        told = net.eval()(pictures).classes.numpy()
    of_file = answers_of_file(file, pictures)
    is_same = told.argmax(1) == of_file.argmax(1)
    best = np.sort(of_file, axis=1)
    is_tie = best[:, -1] - best[:, -2] < 0.5  # drawn cells lie near the borders of the classes
    assert is_same[~is_tie].mean() > 0.95, "the file rounds what lies beyond its range"
    assert is_same.mean() > 0.85
    assert np.abs(told - of_file).mean() < 0.15 * np.abs(of_file).mean()


def test_its_norms_hold_the_statistics_of_what_they_meet(pictures: torch.Tensor) -> None:
    net, file = shipped_net()
    load_shipped(net, file, pictures.split(16))
    spread = torch.cat([m.running_var for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    assert float(spread.min()) > 0
    assert float(spread.std()) > 0  # plain shifts would all have one


def taught_net() -> CellNet:
    """A net whose norms scale otherwise than what they meet is spread, as after a training."""
    torch.manual_seed(2)
    net = CellNet("shufflenetv2-x0.5", 3, [2])
    net.train()
    for _ in range(60):  # the running statistics follow by a tenth each time
        net(torch.rand(8, 3, 64, 64))
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.weight.mul_(torch.empty_like(norm.weight).uniform_(0.2, 3.0))
            norm.bias.normal_(0, 0.3)
    for _ in range(60):
        net(torch.rand(8, 3, 64, 64))
    return net.eval()


def folded_layers(net: CellNet) -> list[warm_start.Weights]:
    """Kernels and biases as a float file of the net holds them."""
    folded = cellnet.fold_batch_norm(net)
    layers = warm_start.layers_in_order(folded, torch.rand(1, 3, 64, 64))
    return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]


def test_a_net_that_was_folded_answers_and_learns_on_like_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, file, batch = taught_net(), tmp_path / "net.tflite", torch.rand(16, 3, 64, 64)
    warm_start.save_norms(before, file)
    monkeypatch.setattr(warm_start, "read_layers", lambda _path: folded_layers(before))
    net = CellNet("shufflenetv2-x0.5", 3, [2], dropout=0.0)
    load_shipped(net, file, torch.rand(4, 3, 64, 64).split(4))
    before.dropout.p = 0.0
    with torch.no_grad():
        for is_learning in (False, True):
            wanted, told = (n.train(is_learning)(batch).classes for n in (before, net))
            assert (told - wanted).abs().max() < 0.05 * wanted.abs().max(), is_learning


def test_statistics_that_are_not_of_folded_kernels_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, file = taught_net(), tmp_path / "net.tflite"
    norms = {n: m for n, m in before.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    old = {f"{n}.{key}": getattr(m, key).numpy() for n, m in norms.items() for key in ("running_mean", "running_var")}
    np.savez_compressed(warm_start.norms_file(file), **old)
    monkeypatch.setattr(warm_start, "read_layers", lambda _path: folded_layers(before))
    net = CellNet("shufflenetv2-x0.5", 3, [2])
    load_shipped(net, file, [torch.rand(16, 3, 64, 64)])
    assert "holds no statistics of folded kernels" in capsys.readouterr().err
    batch = torch.rand(16, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(net.eval()(batch).classes, before.eval()(batch).classes, atol=1e-3)


def test_another_nets_file_is_refused(pictures: torch.Tensor) -> None:
    _, file = shipped_net()
    with pytest.raises(FileDoesNotFit, match="layers"):
        load_shipped(CellNet("shufflenetv2-x0.5", 8, [2, 3]), file, pictures.split(16))


def test_depthwise_and_plain_kernels_come_in_the_nets_layout() -> None:
    _, file = shipped_net()
    shapes = [kernel.shape for kernel, _ in read_layers(file)]
    assert shapes[0] == (24, 3, 3, 3)
    assert (58, 1, 3, 3) in shapes
