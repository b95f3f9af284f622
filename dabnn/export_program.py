"""Packed models as `torch.export` programs (.pt2): a graph of torch's operators and of those of `kernels`.

The program is the network in the form in which it runs (`dabnn.fusion`, with weights="bits"), so it gives the same
logits bit for bit, as fast, without the code of `dabnn`: `import kernels; torch.export.load(path).module()(images)`.
Binary weights are the words that the kernels read; what is half in the packed file is half here, and made float32 in
each call.

torch's own reader trusts a .pt2 file, which may run any code; `load_program` shows it nothing but what an export writes
(`dabnn.program_file`). Left out: compiling the program for machines without Python (AOTInductor).
"""

import copy
import io
import json
import logging
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dabnn.errors import InvalidInputError
from dabnn.exported import ExportedModel, describe, described
from dabnn.packed import PackedModel
from dabnn.program_file import ABOUT, read_program
from dabnn.whole_file import write_whole

# What torch.export notes of the Python code that it traced: half of a small file, and folders of this machine.
_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")


def export_program(packed: PackedModel, path: Path | str) -> int:
    """Write a packed model as a `torch.export` program, in one step.

    It takes images (batch, in_channels, input_size, input_size) float32, normalized, in any strides, and returns logits
    (batch, num_classes) float32; any batch, on the CPU. The extra file `dab.json` says how to prepare images and holds
    the names of the classes (`dabnn.exported`).

    Args:
        packed: From `dabnn.packed.pack` or `load_packed`.
        path: The file; an existing one is replaced. Its name ends in .pt2, as torch asks.

    Returns:
        Size of the file in bytes.

    Raises:
        InvalidInputError: The folder does not exist.
        DabError: The file cannot be written; no part of it is left.
    """
    spec = packed.spec
    with torch.inference_mode(False), torch.no_grad():  # modes that are entered in it stand in the graph
        network = _Program(_stored(packed)).eval()
        example = torch.zeros(2, spec.in_channels, spec.input_size, spec.input_size)
        sizes = {"images": {0: torch.export.Dim("batch", min=1)}}
        program = torch.export.export(network, (example,), dynamic_shapes=sizes)
    program.example_inputs = None
    _tidy(program.graph_module)
    data = io.BytesIO()
    with warnings.catch_warnings():
        # Said of every channels-last weight; it is written whole, strides and all.
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(program, data, extra_files={ABOUT: json.dumps(describe(packed))})
    return write_whole(Path(path), _with_short_texts(data))


def load_program(path: Path | str) -> ExportedModel:
    """Read a program that `export_program` wrote, to run on the CPU; nothing else in the file is read or runs.

    Raises:
        InvalidInputError: There is no such file, or it is damaged or something else.
    """
    path = Path(path)
    about, archive = read_program(path)
    return described(path, about, lambda: _loaded(path, archive).module())


def wrong_constants(packed: PackedModel, path: Path | str) -> list[str]:
    """Return the names of the tensors of a program that are not the bits and numbers of a packed model."""
    found = _loaded(Path(path), read_program(Path(path))[1]).state_dict
    expected = _Program(_stored(packed)).state_dict()
    names = found.keys() | expected.keys()
    return sorted(n for n in names if n not in found or n not in expected or not torch.equal(found[n], expected[n]))


class _Program(nn.Module):
    """A network that takes images in any strides, as `PackedModel` does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images.contiguous(memory_format=torch.channels_last))
        return logits


class _FromHalf(nn.Module):
    """A float32 weight that is kept as float16."""

    def forward(self, half: Tensor) -> Tensor:
        return half.float()

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (weight.half(),)  # one tensor by itself may not be of another type


def _stored(packed: PackedModel) -> nn.Module:
    """Return the network as it runs on the CPU with its bits, whose tensors are its own, half where the file's are."""
    running = replace(packed, weights="bits").to("cpu", torch.float32).running()
    own = {id(tensor): tensor.clone() for tensor in running.buffers()}
    own |= {id(weight): nn.Parameter(weight.detach().clone(), requires_grad=False) for weight in running.parameters()}
    net = copy.deepcopy(running, own)
    for path, module in list(net.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if packed.tensors[f"{path}.weight"].dtype == torch.float16:
            parametrize.register_parametrization(module, "weight", _FromHalf(), unsafe=True)
    return net


def _tidy(module: torch.fx.GraphModule) -> None:
    """Take out of a traced graph what changes nothing, and what it says about the code that was traced."""
    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        for name in _NOTES:
            node.meta.pop(name, None)
        if node.target is aten._assert_tensor_metadata.default:  # noqa: SLF001 - the operator's own name
            module.graph.erase_node(node)
        elif node.target in (aten.to.dtype, aten.detach.default) and all(user.op != "output" for user in node.users):
            source = node.args[0]
            if source.meta["val"].dtype == node.meta["val"].dtype:
                node.replace_all_uses_with(source)
                module.graph.erase_node(node)
    module.recompile()


def _with_short_texts(data: io.BytesIO) -> bytes:
    """Return the archive with its JSON compressed, which torch leaves as it is; its reader takes both."""
    shorter = io.BytesIO()
    with zipfile.ZipFile(data) as source, zipfile.ZipFile(shorter, "w") as target:
        for entry in source.infolist():
            kind = zipfile.ZIP_DEFLATED if entry.filename.endswith(".json") else zipfile.ZIP_STORED
            target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry), kind)  # without the time of day
    return shorter.getvalue()


def _loaded(path: Path, archive: io.BytesIO) -> torch.export.ExportedProgram:
    log = logging.getLogger(torch.export.__name__)
    was_disabled, log.disabled = log.disabled, True  # of what is raised below it would log a traceback
    try:
        with warnings.catch_warnings():
            # Of torch 2.11's reader, about what it reads.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.export.load(archive)
    except Exception as error:  # torch's reader raises whatever its parts do
        raise InvalidInputError(
            f"{path}: torch {torch.__version__} cannot read this program. Export it again with this torch, or load it "
            "with the one that wrote it."
        ) from error
    finally:
        log.disabled = was_disabled
