"""The three classifiers of the study are exchanged by the name in the manifest: the agent opens any and asks it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

from agent.config import ModelsSection  # noqa: E402
from agent.inference.manifest import load_manifest, read_model_file  # noqa: E402
from agent.inference.models import open_models  # noqa: E402
from models.classifier import crops  # noqa: E402
from models.classifier.export import ChannelsLast, require_own_file, within_reach, write_entry  # noqa: E402
from models.classifier.tuning import open_base  # noqa: E402
from models.common.quantize import ConversionFailed, begin_folder, export_float, quantize_file, require_same_answers  # noqa: E402
from models.common.warm_start import save_norms  # noqa: E402
from models.nets.cellnet import Answers, CellNet  # noqa: E402

pytestmark = pytest.mark.train

SIDE_PX = 64


@pytest.mark.parametrize("backbone", ["mobilenetv2", "darknet-19-x0.25", "shufflenetv2-x0.5"])
def test_a_folder_with_another_backbone_answers_as_its_net_and_can_be_learnt_from(
    backbone: str, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    begin_folder(Path("models"), folder)
    entry = json.loads((folder / "manifest.json").read_text())["classifier"]
    wording = crops.Wording(entry["classes"], entry["morphology"]["attributes"])
    torch.manual_seed(2)
    net = CellNet(backbone, len(wording.classes), wording.sizes).to(
        memory_format=torch.channels_last
    )  # as training does
    pictures = np.random.default_rng(1).integers(0, 256, (12, SIDE_PX, SIDE_PX, 3), np.uint8)
    inputs = [picture[None].astype(np.float32) / 255 for picture in pictures]
    batch = torch.from_numpy(np.concatenate(inputs)).permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(30):
            net(batch)  # the norms learn what comes: else all that a deep net says is nearly nothing
        net.eval().classes.weight.mul_(5)
    file = f"classifier/another-{backbone}.tflite"
    export_float(ChannelsLast(net), SIDE_PX, tmp_path / "float.tflite")
    quantize_file(tmp_path / "float.tflite", folder / file, inputs)
    save_norms(net, folder / file)
    args = argparse.Namespace(version="9.9.9")
    write_entry(folder, file, backbone, wording, args, "a test", {})

    models = open_models(ModelsSection(folder=folder, classifier=backbone))
    assert models.classifier.identity.name == backbone
    with torch.inference_mode():
        told = net(batch).classes.softmax(1).numpy()
    for picture, shares in zip(pictures, told, strict=True):
        answer = models.classifier.classify(np.ascontiguousarray(picture[..., ::-1]))
        assert list(answer.probabilities.values()) == pytest.approx(shares, abs=0.1)
    examples = [crops.Example(picture, (32, 32, 40, 40), 0, wording.no_attributes) for picture in pictures]
    assert open_base(folder, examples, backbone).entry.name == backbone
    assert all(read_model_file(folder, entry) for entry in load_manifest(folder).entries)


def test_the_file_of_another_classifier_is_not_written_over() -> None:
    first = load_manifest(Path("models")).classifier
    require_own_file(Path("models"), first.name, first.file)
    with pytest.raises(SystemExit, match=f"is the file of {first.name} in the manifest: give another another with"):
        require_own_file(Path("models"), "another", first.file)


def test_a_file_that_has_lost_something_in_conversion_is_refused(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 8 * 3, 4))
    export_float(net, 8, tmp_path / "float.tflite")
    with torch.no_grad():
        net[1].bias[2] += 1
    with pytest.raises(ConversionFailed, match=r"float\.tflite: does not answer as its net does"):
        require_same_answers(net, torch.rand(1, 8, 8, 3), tmp_path / "float.tflite")


class Bright(torch.nn.Module):
    """As loud as its picture is bright."""

    def forward(self, x: torch.Tensor) -> Answers:
        level = x.mean((1, 2, 3))[:, None]
        return Answers(10 * level.expand(-1, 8), level.expand(-1, 5), -100 * level)


def test_what_makes_a_net_shout_does_not_widen_the_ranges_of_all_layers() -> None:
    dim = [np.full((1, 8, 8, 3), level, np.float32) for level in (0.1, 0.15, 0.2)]
    glaring = np.ones((1, 8, 8, 3), np.float32)
    kept = within_reach(Bright(), dim, [dim[0], glaring])
    assert [float(picture.mean()) for picture in kept] == pytest.approx([0.1, 0.15, 0.2, 0.1])
