"""A small convolutional backbone with pretrained weights: the network inside MediaPipe's hand landmark model.

An EfficientNet-B0 (Tan and Le, ICML 2019) without squeeze-and-excitation and with ReLU6 (as EfficientNet-Lite), whose
batch norms were folded into the convolutions' biases: depthwise separable stem, fifteen inverted residuals, a last
expansion, global mean, and linear heads (Zhang et al., "MediaPipe Hands", 2020). `mobile_from_tflite` reads the
weights from `hand_landmark_full.tflite` (Apache-2.0, Google; `handhold assets` fetches it) once, when a training
starts from them; `MobileLandmarks` is the whole network, `MobileBackbone` what our regressors see with.

Strides pad as TensorFlow's SAME does for even sizes: one more pixel at the right and bottom. Images are sRGB in [0,1],
as they are (the normalisation is in the weights), height and width multiples of 32.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MissingAsset, UnusableInput

# input, expanded, output channels; kernel; stride
BLOCKS = (
    (16, 64, 24, 3, 2), (24, 144, 24, 3, 1),
    (24, 144, 40, 5, 2), (40, 240, 40, 5, 1),
    (40, 240, 80, 3, 2), (80, 480, 80, 3, 1), (80, 480, 80, 3, 1),
    (80, 480, 112, 5, 1), (112, 672, 112, 5, 1), (112, 672, 112, 5, 1),
    (112, 672, 192, 5, 2), (192, 1152, 192, 5, 1), (192, 1152, 192, 5, 1), (192, 1152, 192, 5, 1),
)  # fmt: skip
TAPS = (1, 3, 9)  # blocks whose outputs are the maps of strides 4, 8 and 16
FINE = (24, 40)  # channels of strides 4 and 8
COARSE = (112, 1152)  # channels of strides 16 and 32


class Same(nn.Conv2d):
    """A convolution with a bias, padded as SAME of TensorFlow for even sizes."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(before, after, kernel, stride, padding=(kernel - stride) // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.stride[0] == 2 else x)


class Inverted(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, linear 1x1; added to its input where shapes agree."""

    def __init__(self, before: int, inner: int, after: int, kernel: int, stride: int):
        super().__init__()
        self.expand = Same(before, inner, 1)
        self.depthwise = Same(inner, inner, kernel, stride, groups=inner)
        self.project = Same(inner, after, 1)
        self.residual = before == after and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.residual else y


class MobileTrunk(nn.Module):
    """Images (N,3,H,W) in [0,1] -> maps of strides 4, 8, 16 and 32 (24, 40, 112 and 1152 channels), and landmarks
    (N,2,21,3): pixels of a crop of 224 with relative depth, and metres (camera axes, origin near the knuckles).
    Without landmarks, only `maps` can be called."""

    def __init__(self, landmarks: bool = True) -> None:
        super().__init__()
        self.stem = nn.ModuleList([Same(3, 24, 3, 2), Same(24, 24, 3, groups=24), Same(24, 16, 1)])
        self.blocks = nn.ModuleList(Inverted(*b) for b in BLOCKS)
        self.last = nn.ModuleList([Same(192, 1152, 1), Same(1152, 1152, 3, groups=1152)])
        if landmarks:
            self.points, self.world = nn.Linear(1152, 63), nn.Linear(1152, 63)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                linear = m.kernel_size == (1, 1) and m.out_channels < m.in_channels
                nn.init.kaiming_normal_(m.weight, nonlinearity="linear" if linear else "relu")
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *maps, x = self.maps(x)
        mean = x.mean((2, 3))
        return *maps, x, torch.stack([self.points(mean), self.world(mean)], 1).unflatten(-1, (21, 3))

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four maps alone."""
        if x.shape[-1] % 32 or x.shape[-2] % 32:
            raise ValueError(f"images of this backbone are multiples of 32 on both sides, not {tuple(x.shape[-2:])}")
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem[0](x), inplace=True)
        x = self.stem[2](F.relu6(self.stem[1](x), inplace=True))
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TAPS:
                maps.append(x)
        for conv in self.last:
            x = F.relu6(conv(x), inplace=True)
        return *maps, x


class MobileLandmarks(nn.Module):
    """The whole landmark network. Images (N,3,224,224) in [0,1] -> points (N,21,3) pixels and relative depth, presence
    (N,), left (N,) as probabilities, world (N,21,3) metres: the outputs of `hand_landmark_full.tflite`."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = MobileTrunk()
        self.left, self.presence = nn.Linear(1152, 1), nn.Linear(1152, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *_, x, landmarks = self.trunk(image)
        x = x.mean((2, 3))
        return landmarks[:, 0], self.presence(x)[:, 0].sigmoid(), self.left(x)[:, 0].sigmoid(), landmarks[:, 1]


class MobileBackbone(nn.Module):
    """Images (N,3,H,W) in [0,1] -> (features (N,width,H/16,W/16), maps of strides 4 and 8) as `vit.ViT` with a conv
    stem, and the trunk's own landmarks, each number of order one (N,126).

    The features are the maps of strides 16 and 32, each through a 1x1 convolution, summed and normalised."""

    def __init__(self, width: int):
        super().__init__()
        self.trunk = MobileTrunk()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in COARSE)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        quarter, eighth, coarse, last, landmarks = self.trunk(x)
        up = F.interpolate(self.lateral[1](last), scale_factor=2.0, mode="bilinear", align_corners=False)
        grid = self.lateral[0](coarse) + up
        points = landmarks[:, 0] / 112
        points = torch.cat([points[..., :2] - 1.0, points[..., 2:]], -1)
        hints = torch.cat([points.flatten(1), 20 * landmarks[:, 1].flatten(1)], 1)
        return self.norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), (quarter, eighth), hints


def load_trunk(path: str | os.PathLike) -> dict[str, Tensor]:
    """State dict of `MobileTrunk`, float32: from the `.tflite` file, or from a `.safetensors` file that holds one under
    any prefix that ends in `trunk.` (also our own checkpoints).

    Raises MissingAsset when there is no file, UnusableInput when it does not hold the trunk.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        state = mobile_from_tflite(path)
    else:
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not path.is_file():
            raise MissingAsset(f"{path} does not exist; give the path of pretrained weights.")
        try:
            state = load(path.read_bytes())
        except (SafetensorError, ValueError) as e:
            raise UnusableInput(f"{path} is not a safetensors file.") from e
    trunk = {k.rpartition("trunk.")[2]: v.float() for k, v in state.items() if "trunk." in k}
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in MobileTrunk().state_dict().items()}
    if {k: v.shape for k, v in trunk.items()} != wanted:
        raise UnusableInput(f"{path} does not hold the weights of the mobile backbone.")
    return trunk


def mobile_from_tflite(path: str | os.PathLike) -> dict[str, Tensor]:
    """State dict of `MobileLandmarks`, float32, from `hand_landmark_full.tflite`.

    The file lists its operators in the order of computation, which is the order of our modules; weights are float16
    behind DEQUANTIZE operators. Raises MissingAsset when there is no file, UnusableInput when it is another network.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingAsset(f"{path} is not there; run `handhold assets` to fetch it.")
    other = f"{path} is not MediaPipe's hand landmark network; run `handhold assets` to fetch it."
    with torch.device("meta"):
        net = MobileLandmarks()
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    names += ["left", "presence", "trunk.points", "trunk.world"]
    try:
        layers = _tflite_layers(path.read_bytes())
    except Exception as e:  # a damaged flatbuffer fails in many ways
        raise UnusableInput(other) from e
    state = {f"{n}.{k}": v for n, pair in zip(names, layers, strict=False) for k, v in pair.items()}
    if len(names) != len(layers) or any(state[k].shape != v.shape for k, v in net.state_dict().items()):
        raise UnusableInput(other)
    return state


def _tflite_layers(data: bytes) -> list[dict[str, Tensor]]:
    """Weight and bias of every convolution and linear layer of a TensorFlow Lite file, in PyTorch's layout."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    graph, op = model.subgraphs[0], schema.BuiltinOperator
    codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]
    behind = {o.outputs[0]: o.inputs[0] for o in graph.operators if codes[o.opcodeIndex] == op.DEQUANTIZE}

    def constant(index: int) -> Tensor:
        tensor = graph.tensors[behind.get(index, index)]
        kind = {schema.TensorType.FLOAT16: torch.float16, schema.TensorType.FLOAT32: torch.float32}[tensor.type]
        values = torch.frombuffer(bytearray(model.buffers[tensor.buffer].data), dtype=kind)
        return values.reshape([int(n) for n in tensor.shape]).float()

    layers = []
    for o in graph.operators:
        code = codes[o.opcodeIndex]
        if code in (op.CONV_2D, op.DEPTHWISE_CONV_2D, op.FULLY_CONNECTED):
            weight, bias = constant(o.inputs[1]), constant(o.inputs[2])
            if code == op.CONV_2D:  # (out, h, w, in)
                weight = weight.permute(0, 3, 1, 2)
            elif code == op.DEPTHWISE_CONV_2D:  # (1, h, w, channels)
                weight = weight.permute(3, 0, 1, 2)
            layers.append({"weight": weight.contiguous(), "bias": bias})
    return layers
