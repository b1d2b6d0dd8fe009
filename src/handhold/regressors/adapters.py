"""Public checkpoints that the user has, converted to networks of this package.

| kind | file | paper | becomes |
|---|---|---|---|
| hamer | `hamer.ckpt` | HaMeR (Pavlakos et al., CVPR 2024) | `parametric.ParametricHand` |
| wilor | `wilor_final.ckpt` | WiLoR (Potamias et al., CVPR 2025) | `wilor.WilorHand` |
| metro | `metro_hand_state_dict.bin` | METRO (Lin et al., CVPR 2021) | `metro.MetroHand` |
| graphormer | `graphormer_hand_state_dict.bin` | Mesh Graphormer (Lin et al., ICCV 2021) | `metro.MetroHand` |

`convert_checkpoint` reads the file in a process of its own (`_convert`: nothing in it is run) and writes safetensors
that `checkpoints.load_model` opens. Every tensor of the file must be taken, or be on the list of those that the network
never uses at inference; a file with others is refused, because then it is not the network we think it is. MANO's own
tensors inside the checkpoints are dropped: the model is the user's MANO file, under its own licence.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnusableInput
from ..files import atomic_file
from ..hand.assets import load_mano
from ..hand.joints import OPENPOSE_FROM_MANO
from ..hand.model import HandModel
from ..pickled import read_object_arrays
from . import checkpoints, parametric
from .hrnet import HRNetConfig
from .metro import GRAPHORMER, METRO, MetroConfig
from .parametric import ParametricConfig
from .vit import HAMER_VIT, ViTConfig, from_hamer
from .wilor import WilorConfig

KINDS = ("hamer", "wilor", "metro", "graphormer")
TIME_LIMIT = 1800.0  # seconds; the largest takes about one minute on a slow disk
# tips of the template's fingers in manopth, thumb to pinky; METRO's queries were made with them
_MANOPTH_TIPS = (745, 317, 444, 556, 673)
_METRO_TIPS = (745, 317, 445, 556, 673)  # and those its evaluation reads off the mesh: the middle finger's differs
# what no forward pass uses: MANO's own arrays, the discriminator of the adversarial prior, a flag of the trainer
_LIGHTNING = (r"mano\..*", r"discriminator\..*", r"initialized")
# in METRO: the word embeddings and pooler that its encoders inherit from BERT, and the classifier of ImageNet
_BERT = (
    r"trans_encoder\.\d\.bert\.embeddings\..*",
    r"trans_encoder\.\d\.bert\.pooler\..*",
    r"trans_encoder\.\d\..*\.graph_conv\.skip_conv\..*",
    r"backbone\.classifier\..*",
)
IGNORED = {"hamer": _LIGHTNING, "wilor": _LIGHTNING, "metro": _BERT, "graphormer": _BERT}


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    kind: str = "auto",
    mano: str | os.PathLike | None = None,
    sampling: str | os.PathLike | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """A public checkpoint of the user's -> a file for `checkpoints.load_model`, in a process of its own.

    source: the `.ckpt` or `.bin` file. target: the safetensors file to write. kind: one of `KINDS`, or "auto".
    mano, sampling: MANO_RIGHT.pkl and mano_downsampling.npz, for METRO and Mesh Graphormer only (`mesh_template`).
    dtype: "float32", or "float16" for half the size and rounded weights.
    Returns {"kind", "network", "tensors", "ignored", "bytes"}. Raises UnusableInput in one sentence.
    """
    if dtype not in ("float32", "float16"):
        raise UnusableInput(f"dtype is {dtype!r}; it must be 'float32' or 'float16'.")
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise UnusableInput(f"{source} does not exist.")
    files = {"source": source, "target": target, "mano": mano, "sampling": sampling}
    job = {k: None if v is None else os.path.abspath(v) for k, v in files.items()} | {"kind": kind, "dtype": dtype}
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    env["OMP_NUM_THREADS"] = "1"  # it copies numbers
    command = [sys.executable, "-m", f"{__package__}._convert"]
    limit = 8 * source.stat().st_size + (16 << 30)  # of address space: torch alone maps several GiB
    try:
        done = subprocess.run(  # noqa: S603
            command, input=json.dumps({"memory": limit, **job}), capture_output=True, text=True, env=env,
            timeout=TIME_LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UnusableInput(f"{source} could not be converted within {TIME_LIMIT / 60:.0f} minutes.") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UnusableInput(f"{source} could not be converted: the converter ended early ({last[:200]}).") from None
    if "error" in answer:
        raise UnusableInput(answer["error"])
    return answer["done"]


def convert_here(
    source: str, target: str, kind: str = "auto", mano: str | None = None, sampling: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """What `convert_checkpoint` does, in this process."""
    from . import _convert

    state = _convert.read_state_dict(source)
    kind = detect_kind(state) if kind == "auto" else kind
    template = None
    if kind in ("metro", "graphormer") and mano is not None and sampling is not None:
        template = mesh_template(mano, sampling)
    with torch.no_grad():
        made = convert_state(state, kind, template)
        n_bytes = write_network(target, made, getattr(torch, dtype))
    return {
        "kind": kind, "network": made.network, "tensors": len(made.state), "ignored": made.extra["ignored"],
        "bytes": n_bytes,
    }  # fmt: skip


def write_network(path: str | os.PathLike, made: Converted, dtype: torch.dtype = torch.float32) -> int:
    """Write what `checkpoints.load_model` reads, tensor by tensor: a file of 2.6 GB passes through little memory.

    Returns the size in bytes. Raises UnusableInput when a value is not finite (in `dtype`).
    """
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    meta = {
        "format": checkpoints.FORMAT,
        "network": made.network,
        "config": json.dumps(asdict(made.config), sort_keys=True),
        "extra": json.dumps(made.extra, sort_keys=True),
    }
    header: dict[str, Any] = {"__metadata__": meta}
    at = 0
    for name, value in made.state.items():
        kind = dtype if value.is_floating_point() else torch.int64
        end = at + value.numel() * kind.itemsize
        header[name] = {"dtype": kinds[kind], "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with atomic_file(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, value in made.state.items():
            value = value.to(dtype if value.is_floating_point() else torch.int64).contiguous()
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UnusableInput(f"The checkpoint's {name!r} holds values that are not finite.")
            f.write(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return 8 + len(text) + at


def load_converted(path: str | os.PathLike, hand: HandModel | None = None, device: str | torch.device = "cpu"):
    """`checkpoints.load_model`, with the user's MANO as the network's hand.

    hand: `load_mano(MANO_RIGHT.pkl)`; HaMeR and WiLoR need it (their rotations and betas mean MANO's). METRO and Mesh
    Graphormer carry their template with them. Raises UnusableInput when it is missing or not the right hand.
    """
    model = checkpoints.load_model(path, device)
    if model.extra.get("kind") in ("hamer", "wilor"):
        if hand is None or hand.side != "right" or hand.n_betas != model.config.n_betas:
            raise UnusableInput(f"{path} speaks of MANO's right hand; give MANO_RIGHT.pkl with it.")
        model._hand = hand.to(dtype=torch.float32, device=device)
    return model


class Keys:
    """The tensors of a checkpoint, with a record of which were taken."""

    def __init__(self, state: dict[str, Tensor], kind: str):
        self.state, self.kind, self.taken = state, kind, set()

    def take(self, key: str) -> Tensor:
        """One tensor; UnusableInput when the checkpoint has none of that name."""
        if key not in self.state:
            raise UnusableInput(f"The checkpoint has no {key!r}, so it is not a checkpoint of {self.kind}.")
        self.taken.add(key)
        return self.state[key]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names start with `prefix`, without it."""
        keys = [k for k in self.state if k.startswith(prefix)]
        self.taken.update(keys)
        return {k.removeprefix(prefix): self.state[k] for k in keys}

    def count(self, pattern: str) -> int:
        """How many different whole numbers stand at the group of `pattern`."""
        found = {m.group(1) for k in self.state if (m := re.match(pattern, k))}
        if not found:
            raise UnusableInput(f"The checkpoint has no layers, so it is not a checkpoint of {self.kind}.")
        return len(found)

    def rest(self) -> tuple[list[str], list[str]]:
        """Tensors that were not taken: (those the network never uses, those nobody knows)."""
        left = sorted(self.state.keys() - self.taken)
        known = [k for k in left if any(re.fullmatch(p, k) for p in IGNORED[self.kind])]
        return known, sorted(set(left) - set(known))


@dataclass(frozen=True)
class Converted:
    """A network in our layout: its name in `checkpoints.NETWORKS`, its settings and its tensors."""

    network: str
    config: Any
    state: dict[str, Tensor]
    extra: dict[str, Any]


def detect_kind(state: dict[str, Tensor]) -> str:
    """Which of `KINDS` a state dict is, by its names; UnusableInput for anything else."""
    if "mano_head.decpose.weight" in state:
        return "hamer"
    if "refine_net.dec_pose.weight" in state:
        return "wilor"
    if any(k.startswith("trans_encoder.") for k in state):
        if "conv_learn_tokens.weight" in state or len(state.get("upsampling.bias", ())) != 778:
            raise UnusableInput("This checkpoint is of a whole body; give the one for hands.")
        return "graphormer" if "grid_feat_dim.weight" in state else "metro"
    raise UnusableInput(f"This is a checkpoint of no known network; known are {', '.join(KINDS)}.")


def convert_state(state: dict[str, Tensor], kind: str = "auto", template: Template | None = None) -> Converted:
    """A public network's tensors, by their public names -> the network in our layout, every tensor accounted for.

    template: METRO's queries (`mesh_template`); needed by metro and graphormer. Raises UnusableInput when a tensor is
    missing, of a wrong shape, or unknown.
    """
    kind = detect_kind(state) if kind == "auto" else kind
    if kind not in KINDS:
        raise UnusableInput(f"kind is {kind!r}; it must be 'auto' or one of {', '.join(KINDS)}.")
    keys = Keys(state, kind)
    try:
        if kind in ("metro", "graphormer"):
            network, config, out = "metro", *_metro(keys, template)
        else:
            network, config, out = ("parametric", *_hamer(keys)) if kind == "hamer" else ("wilor", *_wilor(keys))
    except (RuntimeError, IndexError, ZeroDivisionError) as e:
        raise UnusableInput(f"The checkpoint's tensors are not of the shapes that {kind} has.") from e
    ignored, unknown = keys.rest()
    if unknown:
        raise UnusableInput(
            f"The checkpoint holds {len(unknown)} tensors that {kind} does not have, such as {unknown[0]!r}."
        )
    _check(network, config, out)
    return Converted(network, config, out, {"kind": kind, "ignored": len(ignored)})


def _check(network: str, config: Any, state: dict[str, Tensor]) -> None:
    """Exactly the tensors of the network that `config` describes, or UnusableInput."""
    module, net, _ = checkpoints.NETWORKS[network]
    hand = () if network == "metro" else (HandModel.open("right"),)
    with torch.device("meta"):
        model = getattr(importlib.import_module(f".{module}", __package__), net)(config, *hand)
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if wanted != found:
        bad = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise UnusableInput(
            f"The checkpoint does not fit: {len(bad)} tensors are missing or of another size, first {bad[0]!r} "
            f"({found.get(bad[0])} for {wanted.get(bad[0])})."
        )


def _put(out: dict[str, Tensor], keys: Keys, ours: str, theirs: str) -> None:
    for name in ("weight", "bias"):
        out[f"{ours}.{name}"] = keys.take(f"{theirs}.{name}")


def _vit_config(keys: Keys) -> ViTConfig:
    """Heads are 80 wide in ViT-H, the only size these networks were published with."""
    pos = keys.take("backbone.pos_embed")
    width, depth = pos.shape[-1], keys.count(r"backbone\.blocks\.(\d+)\.")
    return replace(HAMER_VIT, width=width, depth=depth, heads=max(1, width // 80))


_VIT_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_HAMER_LAYER = ("0.norm", "0.fn.to_out.0", "1.norm", "1.fn.to_out.0", "2.norm", "2.fn.net.0", "2.fn.net.3")
_HAMER_PLAIN = ("0.fn.to_qkv", "1.fn.to_q", "1.fn.to_kv")  # without bias


def _vit(keys: Keys, config: ViTConfig) -> dict[str, Tensor]:
    parts = ["patch_embed.proj", "last_norm", *(f"blocks.{i}.{p}" for i in range(config.depth) for p in _VIT_BLOCK)]
    names = ["pos_embed", *(f"{p}.{n}" for p in parts for n in ("weight", "bias"))]
    return {f"backbone.{n}": keys.take(f"backbone.{n}") for n in names}


def _wilor(keys: Keys) -> tuple[WilorConfig, dict[str, Tensor]]:
    config = WilorConfig(_vit_config(keys), keys.take("backbone.decshape.bias").shape[0])
    out = {f"backbone.{k}": v for k, v in from_hamer(_vit(keys, config.vit), config.vit).items()}
    means = {n: keys.take(f"backbone.init_{n}") for n in ("hand_pose", "betas", "cam")}
    tokens = []
    for name, value in (("pose", means["hand_pose"].reshape(16, 6)), ("shape", means["betas"]), ("cam", means["cam"])):
        weight, bias = keys.take(f"backbone.{name}_emb.weight"), keys.take(f"backbone.{name}_emb.bias")
        tokens.append(value @ weight.T + bias)
    out["tokens"] = torch.cat(tokens)[None]
    out |= {"mean_pose": means["hand_pose"].reshape(16, 6), "mean_betas": means["betas"].reshape(-1)}
    out["mean_camera"] = means["cam"].reshape(3)
    for ours, theirs in (("pose", "pose"), ("shape", "shape"), ("camera", "cam")):
        _put(out, keys, ours, f"backbone.dec{theirs}")
        _put(out, keys, f"refine.{ours}", f"refine_net.dec_{theirs}")
    _put(out, keys, "refine.reduce", "refine_net.deconv.first_conv.0")
    for ours, theirs in (("up2", 0), ("up4", 1)):
        out |= {f"refine.{ours}.{k}": v for k, v in keys.under(f"refine_net.deconv.deconv.{theirs}.").items()}
    return config, out


def _hamer(keys: Keys) -> tuple[ParametricConfig, dict[str, Tensor]]:
    layer = "mano_head.transformer.transformer.layers"
    kv = keys.take(f"{layer}.0.1.fn.to_kv.weight")
    config = replace(
        parametric.HAMER,
        vit=_vit_config(keys),
        dim=keys.take("mano_head.decpose.weight").shape[1],
        depth=keys.count(rf"{re.escape(layer)}\.(\d+)\."),
        heads=kv.shape[0] // 2 // parametric.HAMER.dim_head,
        mlp=keys.take(f"{layer}.0.2.fn.net.0.weight").shape[0],
        n_betas=keys.take("mano_head.decshape.bias").shape[0],
    )
    parts = [f"transformer.transformer.layers.{i}.{p}" for i in range(config.depth) for p in _HAMER_LAYER]
    parts += ["decpose", "decshape", "deccam", "transformer.to_token_embedding"]
    names = [f"{p}.{n}" for p in parts for n in ("weight", "bias")]
    names += [f"transformer.transformer.layers.{i}.{p}.weight" for i in range(config.depth) for p in _HAMER_PLAIN]
    names += ["transformer.pos_embedding", "init_hand_pose", "init_betas", "init_cam"]
    head = {n: keys.take(f"mano_head.{n}") for n in names}
    # the query token embeds the number zero, or (an option of the public code) the mean parameters: a constant
    embed = head.pop("transformer.to_token_embedding.weight")
    if embed.shape[1] != 1:
        mean = torch.cat([head["init_hand_pose"], head["init_betas"], head["init_cam"]], 1)
        head["transformer.to_token_embedding.bias"] = (head["transformer.to_token_embedding.bias"] + mean @ embed.T)[0]
    state = _vit(keys, config.vit) | {f"mano_head.{n}": v for n, v in head.items()}
    return config, parametric.from_hamer(state, config)


@dataclass(frozen=True)
class Template:
    """METRO's queries and, for Mesh Graphormer, the mesh they sit on."""

    reference: Tensor  # (216,3) joints and coarse vertices about the wrist, metres
    regressor: Tensor  # (21,778) OpenPose joints of a posed mesh
    adjacency: Tensor  # (195,195) rows sum to one


def mesh_template(mano: str | os.PathLike, sampling: str | os.PathLike) -> Template:
    """The template of METRO's queries, from the user's own files.

    mano: MANO_RIGHT.pkl. sampling: `mano_downsampling.npz` of the public METRO repository (which 195 of the 778
    vertices are kept, and how the coarse mesh hangs together). As METRO: MANO's mean pose and shape, manopth's tips.
    """
    hand = load_mano(mano, side="right", flat_hand_mean=False)
    tables = read_object_arrays(sampling, ("A", "D"))
    down = torch.from_numpy(tables["D"][0]).float() if tables["D"] else torch.zeros(0, 0)
    links = torch.from_numpy(tables["A"][1]) if len(tables["A"]) > 1 else torch.zeros(0, 0)
    n = len(down)
    if down.shape[1:] != hand.v_template.shape[:1] or links.shape != (n, n) or n == 0:
        raise UnusableInput(f"{sampling} is not a table of MANO's mesh; take mano_downsampling.npz of METRO.")
    hand = replace(hand, tip_ids=torch.tensor(_MANOPTH_TIPS))
    posed = hand.with_shape().with_pose(hand.v_template.new_zeros(16, 3))
    reference = torch.cat([posed.joints, down @ posed.vertices]) - posed.joints[:1]
    linked = ((links != 0) | torch.eye(n, dtype=torch.bool)).float()
    regressor = torch.cat([hand.J_regressor, torch.eye(hand.v_template.shape[0])[list(_METRO_TIPS)]])
    return Template(reference, regressor[list(OPENPOSE_FROM_MANO)], linked / linked.sum(1, keepdim=True))


def _metro(keys: Keys, template: Template | None) -> tuple[MetroConfig, dict[str, Tensor]]:
    if template is None:
        raise UnusableInput(
            "This network's queries are the MANO template: give --mano MANO_RIGHT.pkl and --sampling "
            "mano_downsampling.npz (of the public METRO repository) as well."
        )
    config = _metro_config(keys)
    n = config.joints + config.coarse
    out = {"reference": template.reference, "regressor": template.regressor}
    if any(config.graph):
        out["adjacency"] = template.adjacency
    out |= {f"backbone.{k}": v for k, v in keys.under("backbone.").items() if not k.startswith("classifier.")}
    keys.taken -= {"backbone.classifier.weight", "backbone.classifier.bias"}
    for i in range(3):
        a, b = f"encoders.{i}", f"trans_encoder.{i}"
        # positions are stored for 512 tokens; the rows of those that exist are used
        out[f"{a}.positions"] = keys.take(f"{b}.bert.position_embeddings.weight")[: n + config.grid_tokens]
        for ours, theirs in (("embed", "bert.img_embedding"), ("out", "cls_head"), ("skip", "residual")):
            _put(out, keys, f"{a}.{ours}", f"{b}.{theirs}")
        for j in range(config.layers):
            _encoder_layer(out, keys, f"{a}.layers.{j}", f"{b}.bert.encoder.layer.{j}", config.graph[i])
    for ours, theirs in (("camera1", "cam_param_fc"), ("camera2", "cam_param_fc2"), ("camera3", "cam_param_fc3")):
        _put(out, keys, ours, theirs)
    _put(out, keys, "upsample", "upsampling")
    if config.grid_tokens:
        _put(out, keys, "grid_embed", "grid_feat_dim")
    return config, out


def _metro_config(keys: Keys) -> MetroConfig:
    base = GRAPHORMER if keys.kind == "graphormer" else METRO
    blocks = [keys.take(f"trans_encoder.{i}.bert.img_embedding.weight").shape for i in range(3)]
    inner = keys.take("trans_encoder.0.bert.encoder.layer.0.intermediate.dense.weight").shape[0]
    graph = tuple(any(re.match(rf"trans_encoder\.{i}\..*\.graph_conv\.", k) for k in keys.state) for i in range(3))
    if "backbone.transition1.0.0.weight" not in keys.state:
        raise UnusableInput("This checkpoint's picture network is not an HRNet; the released ones (hrnet-w64) are.")
    backbone = HRNetConfig(
        width=keys.take("backbone.transition1.0.0.weight").shape[0],
        stem=keys.take("backbone.conv1.weight").shape[0],
        blocks=keys.count(r"backbone\.layer1\.(\d+)\."),
        modules=tuple(keys.count(rf"backbone\.stage{s}\.(\d+)\.") for s in (2, 3, 4)),
        head=tuple(keys.take(f"backbone.incre_modules.{i}.0.conv1.weight").shape[0] for i in range(4)),
        features=keys.take("backbone.final_layer.0.weight").shape[0],
    )
    return replace(
        base,
        backbone=backbone,
        widths=tuple(s[0] for s in blocks),
        inputs=tuple(s[1] for s in blocks),
        layers=keys.count(r"trans_encoder\.0\.bert\.encoder\.layer\.(\d+)\."),
        mlp_ratio=inner // blocks[0][0],
        graph=graph,
        coarse=keys.take("upsampling.weight").shape[1],
        vertices=keys.take("upsampling.weight").shape[0],
        camera=keys.take("cam_param_fc2.weight").shape[0],
    )


def _encoder_layer(out: dict[str, Tensor], keys: Keys, ours: str, theirs: str, graph: bool) -> None:
    for name in ("weight", "bias"):
        parts = [keys.take(f"{theirs}.attention.self.{p}.{name}") for p in ("query", "key", "value")]
        out[f"{ours}.qkv.{name}"] = torch.cat(parts)
    _put(out, keys, f"{ours}.proj", f"{theirs}.attention.output.dense")
    _put(out, keys, f"{ours}.norm1", f"{theirs}.attention.output.LayerNorm")
    _put(out, keys, f"{ours}.fc1", f"{theirs}.intermediate.dense")
    _put(out, keys, f"{ours}.fc2", f"{theirs}.output.dense")
    _put(out, keys, f"{ours}.norm2", f"{theirs}.output.LayerNorm")
    if graph:
        g = f"{theirs}.graph_conv"
        for a, b in (("norm0", "pre_norm"), ("norm1", "norm1"), ("norm2", "norm2")):
            _put(out, keys, f"{ours}.graph.{a}", f"{g}.{b}")
        for a in ("lin1", "lin2"):
            out[f"{ours}.graph.{a}.weight"] = keys.take(f"{g}.{a}.W")
            out[f"{ours}.graph.{a}.bias"] = keys.take(f"{g}.{a}.b")
        out[f"{ours}.graph.conv.weight"] = keys.take(f"{g}.conv.weight").T  # stored (in, out)
        out[f"{ours}.graph.conv.bias"] = keys.take(f"{g}.conv.bias")
