"""Packed models: binary weights at one bit each, run on packed signs where the inputs are binary too.

`pack` makes one from a trained network, `PackedModel.save` and `load_packed` keep it in a file (`dabnn.packed_file`),
`dabnn.verify` compares it with the network. It runs in the form that `dabnn.fusion` gives it. Left out: training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dabnn import packed_file
from dabnn.errors import InvalidInputError
from dabnn.fusion import NetState, fuse
from dabnn.half import Rounded, to_half, what_is_half
from dabnn.layers import BinaryConv2d
from dabnn.models import ModelSpec, Network
from dabnn.models.folding import SignThreshold, find_threshold, fold, sign_norms, unfold
from dabnn.models.table import float_bytes
from dabnn.packed_check import check_extras, check_layers, check_tensors, lay_out
from dabnn.packed_conv import PackedConv2d
from dabnn.packed_place import check_device, check_dtype, check_images, place, without_autocast
from dabnn.packed_weight_conv import PackedWeightConv2d
from dabnn.quantizers import expand

Weights = Literal["bits", "dense"]

# Of a layer with binary weights: what its bits, alpha and beta stand for.
_REPLACED = ("weight", "alpha", "beta", "threshold")
# What only a BN that is not folded has.
_UNFOLDED = ".running_mean"


@dataclass(frozen=True)
class Normalization:
    """What is done to images before the network: the transform's evaluation form, then (pixels / 255 - mean) / std.

    Attributes:
        mean: One value a channel, of values in [0, 1].
        std: One value a channel.
        transform: Name of the transform, see `dabnn.data.transforms`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: str = "auto"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Normalization":
        """Return what a file holds; one of before there were transforms to choose from names none."""
        return cls(tuple(values["mean"]), tuple(values["std"]), values.get("transform", "auto"))


@dataclass(frozen=True)
class Provenance:
    """Where a packed model comes from, as far as it is known.

    Attributes:
        run_id: Of the run that trained it.
        git_commit: Of the program that trained it.
        data_digest: Of the manifest of the data that it was trained on (`dabnn.data.Manifest.digest`).
        dab_version: Of the program that packed it.
    """

    run_id: str | None = None
    git_commit: str | None = None
    data_digest: str | None = None
    dab_version: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Provenance":
        """Return what is known of the fields; others, such as a later version may write, are left out."""
        return cls(**{field.name: values.get(field.name) for field in fields(cls)})


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A network for inference whose binary weights are bits; `pack` and `load_packed` make one.

    Attributes:
        net: The network, in evaluation mode.
        spec: What `dabnn.models.build` was given.
        tensors: What a file holds, by name; see `dabnn.packed_file`.
        float_bytes: Bytes of the same network with all weights and BN statistics in float32 (`dabnn.models.table`).
        classes: Class names in the order of the logits, or None.
        normalization: What to do to images first, or None if unknown; their size is `spec.input_size`.
        provenance: The run, program and data that it comes from.
        dtype: In which the float layers run; logits come in it.
        weights: How binary weights are held in layers with real inputs, see `load_packed`.
    """

    net: Network
    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    float_bytes: int
    classes: tuple[str, ...] | None = None
    normalization: Normalization | None = None
    provenance: Provenance = Provenance()
    dtype: torch.dtype = torch.float32
    weights: Weights = "bits"
    _fused: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of normalized images (N, in_channels, input_size, input_size).

        The network runs channels-last, in which packed signs come and go without a transposition. Float layers round
        differently there: the same logits, bit for bit, are those of the trained network on channels-last images.
        Autocast does not reach into it: `to(dtype=...)` chooses the types.

        Args:
            images: float32, or in the model's `dtype`; on its device, in any strides.

        Raises:
            InvalidInputError: The images have another type, device, number of channels or size.
        """
        device = self.device
        check_images(self.spec, images, self.dtype, device)
        with without_autocast(device):
            logits: Tensor = self.running()(images.to(self.dtype, memory_format=torch.channels_last))
        return logits

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    @torch.inference_mode(False)
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PackedModel":
        """Return this model on another device, with its float layers in another type; `save` writes the same file.

        Bits, scalars, thresholds and batch normalisation keep their types (`dabnn.packed_place`). In bfloat16 and
        float16 the logits are rounded accordingly, and come in that type.

        Args:
            device: Such as "cuda" or "cpu".
            dtype: float32, bfloat16 or float16; None as it is.

        Raises:
            InvalidInputError: There is no such device, or the type is another one.
        """
        target = check_dtype(self.dtype if dtype is None else dtype), check_device(device)
        # Anew from the file's tensors: what was rounded once would stay so.
        frame = _lay_out("net", asdict(self.spec))
        extras = (self.classes, self.normalization, self.provenance)
        model = _assemble("net", frame, self.tensors, *extras, self.weights)
        return replace(model, net=place(model.net, target[1], target[0]), dtype=target[0])

    def running(self) -> Network:
        """Return the form in which the network runs (`dabnn.fusion`), made anew when `net` was changed.

        A change is another tensor or module in `net`, or a write that torch counts; what is written behind its back,
        into `tensor.data` or through NumPy, is not seen. `save` writes `tensors`, which no change of `net` reaches.
        """
        if not self._fused or not self._fused["state"].holds():
            with torch.inference_mode(False):  # of tensors made in it nothing rearranged is kept
                state = NetState(self.net)
                self._fused.update(net=fuse(self.net), state=state)
        net: Network = self._fused["net"]
        return net

    @property
    def is_half(self) -> bool:
        """Whether scalars or float layers are rounded to float16."""
        return self.rounded != "none"

    @property
    def rounded(self) -> Rounded:
        """Which real values are rounded to float16: none, the head's, which no sign depends on, or all."""
        return what_is_half(self.tensors)

    def save(self, path: Path | str, *, half: bool = False, keep_signs: bool = False) -> int:
        """Write the packed file in one step.

        Args:
            path: The file; an existing one is replaced.
            half: Round scalars and float layers to float16, which halves their bytes.
            keep_signs: Of them, round only what no sign depends on, so that every sign stays what it is.

        Returns:
            Size of the file in bytes.

        Raises:
            InvalidInputError: The folder does not exist, or a value that is no threshold is beyond the range of
                float16.
            DabError: The file cannot be written, for example because the disk is full; no part of it is left.
        """
        extras = {
            "classes": self.classes,
            "normalization": None if self.normalization is None else asdict(self.normalization),
            "provenance": asdict(self.provenance),
        }
        tensors = to_half(self.tensors, self.net, keep_signs=keep_signs) if half else self.tensors
        return packed_file.write(Path(path), packed_file.Content(asdict(self.spec), extras, tensors))


def pack(
    net: Network,
    *,
    classes: Sequence[str] | None = None,
    normalization: Normalization | None = None,
    provenance: Provenance | None = None,
    weights: Weights = "bits",
) -> PackedModel:
    """Packs a network from `dabnn.models.build`; the network itself is left alone.

    Args:
        net: The trained network, on any device, in any mode.
        classes: Class names in the order of the logits.
        normalization: What was done to its images.
        provenance: Where it comes from.
        weights: See `load_packed`.

    Returns:
        The packed model, on the CPU.

    Raises:
        InvalidInputError: The network is not from `build`, was changed after it, holds NaN or infinite weights, or has
            a layer with binary inputs that has no packed form; the message names the layer.
    """
    if not isinstance(net, Network):
        raise InvalidInputError(
            f"net: {type(net).__name__} carries no model.spec to rebuild it from. Pack what dabnn.models.build returns "
            "(for a wrapped network, its .module)."
        )
    if classes is not None and len(classes) != net.spec.num_classes:
        raise InvalidInputError(
            f"classes: {len(classes)} names for {net.spec.num_classes} logits. Give one name a logit."
        )
    frame = _lay_out("net", asdict(net.spec))
    check_layers(net, frame.net)
    tensors = {name: tensor.cpu().float() for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for path, layer in binary_layers(net).items():
        code = layer.code()
        for name in _REPLACED:
            tensors.pop(f"{path}.{name}", None)
        tensors[f"{path}.weight_bits"] = packed_file.encode_mask(code.mask)
        tensors[f"{path}.alpha"] = code.alpha.float().cpu()
        tensors[f"{path}.beta"] = code.beta.float().cpu()
    names = None if classes is None else tuple(classes)
    return _assemble("net", frame, tensors, names, normalization, provenance or Provenance(), weights)


def load_packed(path: Path | str, *, weights: Weights = "bits") -> PackedModel:
    """Reads a packed file; nothing in it is executed, and no size in it is believed that the file does not have.

    Args:
        path: From `PackedModel.save`.
        weights: How binary weights are held where a layer's inputs are real. `bits`: as bits, which is smaller, and
            faster on processors with AVX-512; the layer's values are those of the trained network up to rounding
            (`kernels.weight_only`). `dense`: as float32, of which torch makes the same values, bit for bit.

    Returns:
        The packed model, on the CPU, ready to be called on images.

    Raises:
        InvalidInputError: There is no such file, or it is not a packed model, is damaged, is of a newer version, or
            names a model that this program does not have.
    """
    path, source = Path(path), str(path)
    header = packed_file.read_header(path)
    frame = _lay_out(source, header.spec)
    _check_header(source, frame, header)
    extras = header.extras
    normalization = extras.get("normalization")
    return _assemble(
        source,
        frame,
        packed_file.read_tensors(path, header).tensors,
        None if extras.get("classes") is None else tuple(extras["classes"]),
        None if normalization is None else Normalization.of(normalization),
        Provenance.of(extras.get("provenance") or {}),
        weights,
    )


def _check_header(source: str, frame: "_Frame", header: packed_file.Header) -> None:
    check_extras(source, header.extras, num_classes=frame.net.spec.num_classes, in_channels=frame.net.spec.in_channels)
    is_folded = not any(name.endswith(_UNFOLDED) for name in header.shapes)
    check_tensors(source, frame.folded_shapes() if is_folded else frame.shapes, header.shapes)
    for name, kind in header.types.items():
        if name.endswith("_bits") != (kind == "U8"):
            raise InvalidInputError(
                f"{source}: {name} is of type {kind}; bits are U8, and all else is F32 or F16. Export the model again."
            )


def binary_layers(net: nn.Module) -> dict[str, BinaryConv2d]:
    """Returns the layers with binary weights by their path in the network."""
    modules = net.named_modules()
    return {path: m for path, m in modules if isinstance(m, BinaryConv2d) and m.weight_quantizer is not None}


@dataclass(frozen=True, eq=False)
class _Frame:
    """A network on torch's device meta, and the shapes of the tensors that its packed form has.

    Attributes:
        net: The network, without memory.
        layers: Its layers with binary weights by path.
        norms: Its BN by path, and whether nothing but its sign is read.
        shapes: Of the tensors by name, BN not folded.
    """

    net: Network
    layers: Mapping[str, BinaryConv2d]
    norms: Mapping[str, tuple[nn.BatchNorm2d, bool]]
    shapes: Mapping[str, tuple[int, ...]]

    def folded_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors by name, as a file of this version has them."""
        return _folded_shapes(self.shapes, self.norms)


def _lay_out(source: str, spec: Mapping[str, Any]) -> _Frame:
    net = lay_out(source, spec)
    layers = binary_layers(net)
    float_state = {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    return _Frame(net, layers, _norms(net), _packed_shapes(float_state, layers))


@torch.inference_mode(False)
def _assemble(
    source: str,
    frame: _Frame,
    tensors: Mapping[str, Tensor],
    classes: tuple[str, ...] | None,
    normalization: Normalization | None,
    provenance: Provenance,
    weights: Weights,
) -> PackedModel:
    if weights not in get_args(Weights):
        raise InvalidInputError(f"weights: {weights!r}; use one of {', '.join(get_args(Weights))}.")
    real_form = PackedWeightConv2d if weights == "bits" else _two_valued_conv
    tensors = {name: tensor.clone() if tensor.is_inference() else tensor for name, tensor in tensors.items()}
    net, num_bytes = frame.net, float_bytes(frame.net)
    if any(name.endswith(_UNFOLDED) for name in tensors):  # a network, or a file of version 1
        check_tensors(source, frame.shapes, _shapes(tensors))
        tensors = _folded(frame.norms, tensors)
    check_tensors(source, frame.folded_shapes(), _shapes(tensors))
    replaced = {f"{path}.{name}" for path in frame.layers for name in _REPLACED}
    kept = frame.shapes.keys() & tensors.keys() & net.state_dict().keys() - replaced
    net.load_state_dict({name: tensors[name].float().clone() for name in kept}, strict=False, assign=True)
    for path, layer in frame.layers.items():
        mask = packed_file.decode_mask(tensors[f"{path}.weight_bits"], layer.weight.shape)
        alpha, beta = (tensors[f"{path}.{name}"].float() for name in ("alpha", "beta"))
        form = PackedConv2d if layer.binary_input else real_form
        try:
            net.set_submodule(path, form(layer, mask, alpha, beta))
        except InvalidInputError as error:
            raise InvalidInputError(f"{error} It is {path}.") from error
    for path, (_, is_sign) in frame.norms.items():
        net.set_submodule(path, _packed_norm(path, tensors, is_sign=is_sign))
    net.eval().requires_grad_(False)
    place(net, torch.device("cpu"), torch.float32)
    return PackedModel(net, net.spec, tensors, num_bytes, classes, normalization, provenance, weights=weights)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _packed_shapes(float_state: Mapping[str, Tensor], layers: Mapping[str, BinaryConv2d]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the packed form of a network has, BN not folded."""
    shapes = {name: tuple(tensor.shape) for name, tensor in float_state.items()}
    for path, layer in layers.items():
        for name in _REPLACED:
            shapes.pop(f"{path}.{name}", None)
        shapes[f"{path}.weight_bits"] = (-(-layer.weight.numel() // 8),)
        shapes[f"{path}.alpha"] = shapes[f"{path}.beta"] = (layer.out_channels,)
    return shapes


def _norms(net: nn.Module) -> dict[str, tuple[nn.BatchNorm2d, bool]]:
    """Return every BN by its path, and whether nothing but its sign is read."""
    signs = sign_norms(net)
    return {path: (m, path in signs) for path, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}


def _folded(norms: Mapping[str, tuple[nn.BatchNorm2d, bool]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a network with each BN as a packed file keeps it."""
    folded = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in norms}
    for path, (shape, is_sign) in norms.items():
        norm = nn.BatchNorm2d(shape.num_features, shape.eps, affine=shape.affine)
        own = {name: tensors[f"{path}.{name}"] for name in norm.state_dict() if f"{path}.{name}" in tensors}
        norm.load_state_dict(own, strict=False)
        if is_sign:
            folded[f"{path}.threshold"], falls = find_threshold(norm)
            folded[f"{path}.falls_bits"] = packed_file.encode_mask(falls.view(-1, 1, 1, 1))
        else:
            folded[f"{path}.scale"], folded[f"{path}.shift"] = fold(norm)
    return folded


def _folded_shapes(
    shapes: Mapping[str, tuple[int, ...]], norms: Mapping[str, tuple[nn.BatchNorm2d, bool]]
) -> dict[str, tuple[int, ...]]:
    folded = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] not in norms}
    for path, (norm, is_sign) in norms.items():
        channels = norm.num_features
        folded[f"{path}.threshold" if is_sign else f"{path}.scale"] = (channels,)
        folded[f"{path}.falls_bits" if is_sign else f"{path}.shift"] = (-(-channels // 8) if is_sign else channels,)
    return folded


def _packed_norm(path: str, tensors: Mapping[str, Tensor], *, is_sign: bool) -> nn.Module:
    if not is_sign:
        return unfold(tensors[f"{path}.scale"].float(), tensors[f"{path}.shift"].float())
    threshold = tensors[f"{path}.threshold"].float()
    falls = packed_file.decode_mask(tensors[f"{path}.falls_bits"], torch.Size((len(threshold), 1, 1, 1)))
    return SignThreshold(threshold, falls.view(-1))


def _two_valued_conv(layer: BinaryConv2d, mask: Tensor, alpha: Tensor, beta: Tensor) -> BinaryConv2d:
    """Return a convolution with the dense two-valued weight, which its real inputs need."""
    conv = BinaryConv2d.from_conv(layer, weight_quantizer=None, center=None, binary_input=False)
    conv.weight = nn.Parameter(expand(mask, alpha, beta))
    return conv
