"""Weights of a shipped TFLite file back into its PyTorch net, so that training can go on from what is shipped.

A shipped file is all that a laboratory has. Batch norms were folded into the convolutions before them; what comes out
of the folded kernels, as mean and variance, lies beside the file (`.norms.npz`, some 100 KB) and unfolds them again.
For a file without, the statistics are those that the net meets on given pictures. The net then answers as the file does
(up to the rounding of int8), and learns on like one that was never folded, also where norms take a batch's statistics.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray
from torch import Tensor, nn

from models.common.programs import Unfit

Weights = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Kernel in PyTorch's layout, (out, in / groups, height, width) or (out, in), and bias, (out,)."""

WITH_WEIGHTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
LEAST_VARIANCE = 1e-6


class FileDoesNotFit(Unfit):
    """The file holds another net than the one that is to take its weights."""


def load_shipped(
    net: nn.Module, path: Path, pictures: Iterable[Tensor], is_stored: Callable[[str], bool] = lambda _name: True
) -> None:
    """Give a net the weights of a TFLite file.

    net: changed in place. pictures: what the norms' statistics are taken from where none lie beside the file;
    batches (b, 3, side, side),
    float, 0 to 1. is_stored: whether the file has a layer of this name; one that it has not keeps its weights, and its
    norm answers zero. Raises FileDoesNotFit where the file's layers are not the net's.
    """
    batches = list(pictures)
    stored = read_layers(path)
    names = {module: name for name, module in net.named_modules()}
    run = layers_in_order(net, batches[0][:1])
    layers = {layer: norm for layer, norm in run.items() if is_stored(names[layer])}
    shapes = [tuple(layer.weight.shape) for layer in layers]
    if [kernel.shape for kernel, _ in stored] != shapes:
        raise FileDoesNotFit(f"{path}: its {len(stored)} layers are not the {len(shapes)} of {type(net).__name__}")
    with torch.no_grad():
        for (layer, norm), (kernel, bias) in zip(layers.items(), stored, strict=True):
            layer.weight.copy_(torch.from_numpy(kernel))
            if norm is None:
                layer.bias.copy_(torch.from_numpy(bias))
            else:
                make_plain(norm, torch.from_numpy(bias))
        for layer, norm in run.items():
            if layer not in layers and norm is not None:
                make_plain(norm, torch.zeros_like(norm.bias))
                norm.weight.zero_()
        norms = [norm for norm in layers.values() if norm is not None]
        if not use_norms(net, norms, path):
            unfold(net.eval(), norms, batches)


def norms_file(path: Path) -> Path:
    """Where the norms' statistics of a TFLite file lie."""
    return path.with_suffix(".norms.npz")


def save_norms(net: nn.Module, path: Path) -> None:
    """Write what a net's norms meet behind folded kernels beside its TFLite file, in half precision by their names."""
    arrays = {}
    for name, norm in net.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            for key, values in zip(STATISTICS, behind_folded_kernel(norm), strict=True):
                arrays[f"{name}.{key}"] = values.half().numpy()
    np.savez_compressed(norms_file(path), **arrays)


@torch.no_grad()
def behind_folded_kernel(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and variance, (channels,), of what comes out of the kernel before a norm once that is folded into it.

    Folding multiplies the kernel by the norm's scale, so they are not what the norm has met itself. Of a pair of
    kernels that export merges each has its own: behind the merged one that is near the truth only.
    """
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return norm.running_mean * scale, norm.running_var * scale.square()


STATISTICS = ("folded_mean", "folded_variance")


def use_norms(net: nn.Module, norms: list[nn.BatchNorm2d], path: Path) -> bool:
    """Split the plain shifts of these norms by the statistics beside a file; False where there are none.

    Before 2026-12 the files held what the norms themselves had met, which unfolds nothing: those are passed over.
    """
    file = norms_file(path)
    if not file.exists():
        return False
    stored = np.load(file)
    names = {module: name for name, module in net.named_modules()}
    if any(f"{names[norm]}.{key}" not in stored for norm in norms for key in STATISTICS):
        print(f"{file}: holds no statistics of folded kernels: they are taken from pictures", file=sys.stderr)
        return False
    for norm in norms:
        mean, variance = (torch.from_numpy(stored[f"{names[norm]}.{key}"]).float() for key in STATISTICS)
        split(norm, mean, variance.clamp(min=LEAST_VARIANCE))
    return True


def split(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """A norm that only adds a shift gets statistics, and an affine part that takes them back."""
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.add_(mean)


def make_plain(norm: nn.BatchNorm2d, shift: Tensor) -> None:
    """A norm that only adds `shift`."""
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    norm.weight.fill_(1)
    norm.bias.copy_(shift)


def unfold(net: nn.Module, norms: list[nn.BatchNorm2d], batches: list[Tensor]) -> None:
    """Split each norm's plain shift into statistics and affine part; what the net answers stays."""
    totals: dict[nn.Module, Tensor] = {norm: torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms}
    counts: dict[nn.Module, int] = dict.fromkeys(norms, 0)

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double()
        totals[norm] += torch.stack((values.sum((0, 2, 3)), values.square().sum((0, 2, 3))))
        counts[norm] += values.numel() // values.shape[1]

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    for batch in batches:
        net(batch)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        mean, square = totals[norm] / counts[norm]
        variance = (square - mean.square()).clamp(min=LEAST_VARIANCE)
        split(norm, mean.float(), variance.float())


def layers_in_order(net: nn.Module, picture: Tensor) -> dict[Any, nn.BatchNorm2d | None]:
    """Convolutions and dense layers of a net in the order in which it runs them, each with the norm behind it."""
    found: dict[Any, nn.BatchNorm2d | None] = {}
    made_by: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # alive, so that no two outputs share an id

    def note_layer(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[layer] = None
        kept.append(output)
        made_by[id(output)] = layer

    def note_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[made_by[id(inputs[0])]] = norm

    hooks = [m.register_forward_hook(note_layer) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks += [m.register_forward_pre_hook(note_norm) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        net.eval()(picture)
    for hook in hooks:
        hook.remove()
    return found


def read_layers(path: Path) -> list[Weights]:
    """Real-valued kernels and biases of a float or int8 file, in the order in which the file runs them.

    Raises Unfit where there is no such file.
    """
    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        interpreter = Interpreter(str(path), experimental_op_resolver_type=resolver)
    except (ValueError, RuntimeError) as error:
        raise Unfit(f"{path}: {'cannot be read as a TFLite file' if path.exists() else 'not there'}") from error
    interpreter.allocate_tensors()
    details = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    layers = []
    for operation in interpreter._get_ops_details():  # the package has no public way to the graph
        if operation["op_name"] in WITH_WEIGHTS:
            _, kernel_index, bias_index = operation["inputs"]
            kernel = real_values(interpreter, details[kernel_index])
            if operation["op_name"] == "CONV_2D":
                kernel = kernel.transpose(0, 3, 1, 2)
            elif operation["op_name"] == "DEPTHWISE_CONV_2D":
                kernel = kernel.transpose(3, 0, 1, 2)
            layers.append((np.ascontiguousarray(kernel), real_values(interpreter, details[bias_index])))
    return layers


def real_values(interpreter: Interpreter, tensor: dict[str, Any]) -> NDArray[np.float32]:
    """A constant tensor, dequantised by its scales (one, or one for each place of `quantized_dimension`)."""
    values = interpreter.get_tensor(tensor["index"]).astype(np.float64)
    quantisation = tensor["quantization_parameters"]
    scales, zeros = quantisation["scales"], quantisation["zero_points"]
    if len(scales):
        shape = [1] * values.ndim
        shape[quantisation["quantized_dimension"] if len(scales) > 1 else 0] = len(scales)
        values = (values - zeros.reshape(shape)) * scales.reshape(shape)
    return values.astype(np.float32)
