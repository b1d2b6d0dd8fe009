"""The public hand networks once more, for the tests of the adapters: which tensors their files hold, and what they
compute, written as formulas over those names. Nothing here knows the package's own modules. Tables and formulas were
compared with the public code (HaMeR, WiLoR, METRO, Mesh Graphormer): names and shapes are equal at full size, results
to 4e-6 on noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = dict[str, tuple[int, ...]]


def linear_names(p: str, n_in: int, n_out: int, bias: bool = True) -> Layout:
    return {f"{p}.weight": (n_out, n_in)} | ({f"{p}.bias": (n_out,)} if bias else {})


def norm_names(p: str, n: int) -> Layout:
    return {f"{p}.weight": (n,), f"{p}.bias": (n,)}


def bn_names(p: str, n: int) -> Layout:
    return norm_names(p, n) | {f"{p}.running_mean": (n,), f"{p}.running_var": (n,), f"{p}.num_batches_tracked": ()}


def conv_names(p: str, a: int, b: int, k: int, bias: bool = False) -> Layout:
    return {f"{p}.weight": (b, a, k, k)} | ({f"{p}.bias": (b,)} if bias else {})


def vit_layout(width: int, depth: int) -> Layout:
    out = {"backbone.pos_embed": (1, 193, width)} | conv_names("backbone.patch_embed.proj", 3, width, 16, True)
    for i in range(depth):
        p = f"backbone.blocks.{i}"
        out |= norm_names(f"{p}.norm1", width) | linear_names(f"{p}.attn.qkv", width, 3 * width)
        out |= linear_names(f"{p}.attn.proj", width, width) | norm_names(f"{p}.norm2", width)
        out |= linear_names(f"{p}.mlp.fc1", width, 4 * width) | linear_names(f"{p}.mlp.fc2", 4 * width, width)
    return out | norm_names("backbone.last_norm", width)


def never_used() -> Layout:
    """What Lightning stores beside the regressor: MANO, the adversarial prior, a flag."""
    out = {"mano.v_template": (778, 3), "mano.faces_tensor": (1538, 3), "mano.shapedirs": (778, 3, 10)}
    out |= {"mano.J_regressor": (16, 778), "mano.posedirs": (135, 2334), "mano.lbs_weights": (778, 16)}
    out |= {"mano.parents": (16,), "mano.joint_map": (21,), "mano.extra_joints_idxs": (5,), "initialized": ()}
    out |= conv_names("discriminator.D_conv1", 9, 32, 1, True) | linear_names("discriminator.betas_out", 5, 1)
    return out | linear_names("discriminator.pose_out.0", 32, 1)


def hamer_layout(width=1280, depth=32, dim=1024, inner=512, layers=6, mlp=1024) -> Layout:
    out = vit_layout(width, depth)
    t = "mano_head.transformer"
    out |= linear_names(f"{t}.to_token_embedding", 1, dim) | {f"{t}.pos_embedding": (1, 1, dim)}
    for i in range(layers):
        p = f"{t}.transformer.layers.{i}"
        for k in range(3):
            out |= norm_names(f"{p}.{k}.norm", dim)
        out |= linear_names(f"{p}.0.fn.to_qkv", dim, 3 * inner, False) | linear_names(f"{p}.0.fn.to_out.0", inner, dim)
        out |= linear_names(f"{p}.1.fn.to_kv", width, 2 * inner, False)
        out |= linear_names(f"{p}.1.fn.to_q", dim, inner, False) | linear_names(f"{p}.1.fn.to_out.0", inner, dim)
        out |= linear_names(f"{p}.2.fn.net.0", dim, mlp) | linear_names(f"{p}.2.fn.net.3", mlp, dim)
    for name, n in (("decpose", 96), ("decshape", 10), ("deccam", 3)):
        out |= linear_names(f"mano_head.{name}", dim, n)
    out |= {"mano_head.init_hand_pose": (1, 96), "mano_head.init_betas": (1, 10), "mano_head.init_cam": (1, 3)}
    return out | never_used()


def wilor_layout(width=1280, depth=32) -> Layout:
    out, b, r = vit_layout(width, depth), "backbone", "refine_net"
    out |= {f"{b}.init_cam": (1, 3), f"{b}.init_hand_pose": (1, 96), f"{b}.init_betas": (1, 10)}
    for name, n in (("pose", 6), ("shape", 10), ("cam", 3)):
        out |= linear_names(f"{b}.{name}_emb", n, width) | linear_names(f"{b}.dec{name}", width, n)
    half, quarter, eighth = width // 2, width // 4, width // 8
    out |= conv_names(f"{r}.deconv.first_conv.0", width, half, 1, True)
    for p, c, d in (("0.0", half, quarter), ("1.0", half, quarter), ("1.3", quarter, eighth)):
        out[f"{r}.deconv.deconv.{p}.weight"] = (c, d, 4, 4)
        out |= bn_names(f"{r}.deconv.deconv.{p[:-1]}{int(p[-1]) + 1}", d)
    for name, n in (("pose", 96), ("cam", 3), ("shape", 10)):
        out |= linear_names(f"{r}.dec_{name}", half + quarter + eighth, n)
    return out | never_used()


def hrnet_layout(width=64, stem=64, blocks=4, modules=(1, 4, 3), head=(32, 64, 128, 256), features=2048) -> Layout:
    out = conv_names("conv1", 3, stem, 3) | bn_names("bn1", stem) | conv_names("conv2", stem, stem, 3)
    out |= bn_names("bn2", stem)

    def bottleneck(p: str, a: int, n: int) -> Layout:
        made = conv_names(f"{p}.conv1", a, n, 1) | bn_names(f"{p}.bn1", n) | conv_names(f"{p}.conv2", n, n, 3)
        made |= bn_names(f"{p}.bn2", n) | conv_names(f"{p}.conv3", n, 4 * n, 1) | bn_names(f"{p}.bn3", 4 * n)
        if a != 4 * n:
            made |= conv_names(f"{p}.downsample.0", a, 4 * n, 1) | bn_names(f"{p}.downsample.1", 4 * n)
        return made

    for k in range(blocks):
        out |= bottleneck(f"layer1.{k}", stem if k == 0 else 4 * stem, stem)
    w = [width * 2**k for k in range(4)]
    out |= conv_names("transition1.0.0", 4 * stem, w[0], 3) | bn_names("transition1.0.1", w[0])
    out |= conv_names("transition1.1.0.0", 4 * stem, w[1], 3) | bn_names("transition1.1.0.1", w[1])
    for k in (2, 3):
        out |= conv_names(f"transition{k}.{k}.0.0", w[k - 1], w[k], 3) | bn_names(f"transition{k}.{k}.0.1", w[k])
    for stage, n in zip((2, 3, 4), modules, strict=True):
        for m in range(n):
            p = f"stage{stage}.{m}"
            for b in range(stage):
                for k in range(blocks):
                    for c in (1, 2):
                        out |= conv_names(f"{p}.branches.{b}.{k}.conv{c}", w[b], w[b], 3)
                        out |= bn_names(f"{p}.branches.{b}.{k}.bn{c}", w[b])
            for i in range(stage):
                for j in range(stage):
                    q = f"{p}.fuse_layers.{i}.{j}"
                    if j > i:
                        out |= conv_names(f"{q}.0", w[j], w[i], 1) | bn_names(f"{q}.1", w[i])
                    for k in range(i - j):
                        n_out = w[i] if k == i - j - 1 else w[j]
                        out |= conv_names(f"{q}.{k}.0", w[j], n_out, 3) | bn_names(f"{q}.{k}.1", n_out)
    for k in range(4):
        out |= bottleneck(f"incre_modules.{k}.0", w[k], head[k])
    for k in range(3):
        out |= conv_names(f"downsamp_modules.{k}.0", 4 * head[k], 4 * head[k + 1], 3, True)
        out |= bn_names(f"downsamp_modules.{k}.1", 4 * head[k + 1])
    out |= conv_names("final_layer.0", 4 * head[3], features, 1, True) | bn_names("final_layer.1", features)
    return out | linear_names("classifier", features, 1000)


def metro_layout(graphormer=False, widths=(1024, 256, 64), narrow=(512, 128), layers=4, words=30522, **hrnet) -> Layout:
    out = {f"backbone.{k}": v for k, v in hrnet_layout(**hrnet).items()}
    inputs, ratio = (hrnet.get("features", 2048) + 3, *narrow), 2 if graphormer else 4
    for i, (h, n_in, n_out) in enumerate(zip(widths, inputs, (*narrow, 3), strict=True)):
        b = f"trans_encoder.{i}.bert"
        out |= {f"{b}.embeddings.word_embeddings.weight": (words, h), f"{b}.position_embeddings.weight": (512, h)}
        out |= {f"{b}.embeddings.position_embeddings.weight": (512, h)}
        out |= {f"{b}.embeddings.token_type_embeddings.weight": (2, h)} | norm_names(f"{b}.embeddings.LayerNorm", h)
        for j in range(layers):
            p = f"{b}.encoder.layer.{j}"
            for name in ("query", "key", "value"):
                out |= linear_names(f"{p}.attention.self.{name}", h, h)
            out |= linear_names(f"{p}.attention.output.dense", h, h) | norm_names(f"{p}.attention.output.LayerNorm", h)
            out |= linear_names(f"{p}.intermediate.dense", h, ratio * h) | linear_names(
                f"{p}.output.dense", ratio * h, h
            )
            out |= norm_names(f"{p}.output.LayerNorm", h)
            if graphormer and i == 2:
                g, m = f"{p}.graph_conv", h // 2
                out |= {f"{g}.lin1.W": (m, h), f"{g}.lin1.b": (m,), f"{g}.lin2.W": (h, m), f"{g}.lin2.b": (h,)}
                out |= {f"{g}.skip_conv.W": (h, h), f"{g}.skip_conv.b": (h,)}
                out |= {f"{g}.conv.weight": (m, m), f"{g}.conv.bias": (m,)}
                out |= norm_names(f"{g}.pre_norm", h) | norm_names(f"{g}.norm1", m) | norm_names(f"{g}.norm2", m)
        out |= linear_names(f"{b}.pooler.dense", h, h) | linear_names(f"{b}.img_embedding", n_in, h)
        out |= linear_names(f"trans_encoder.{i}.cls_head", h, n_out)
        out |= linear_names(f"trans_encoder.{i}.residual", n_in, n_out)
    out |= linear_names("upsampling", 195, 778) | linear_names("cam_param_fc", 3, 1)
    out |= linear_names("cam_param_fc2", 216, 150) | linear_names("cam_param_fc3", 150, 3)
    if graphormer:
        out |= linear_names("grid_feat_dim", 4 * hrnet.get("head", (32, 64, 128, 256))[-1], inputs[0])
    return out


def random_state(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Noise in a layout, scaled so that a deep network keeps its signal."""
    g, out = torch.Generator().manual_seed(seed), {}
    for name, shape in layout.items():
        noise = torch.randn(shape, generator=g)
        if name.endswith(("num_batches_tracked", "faces_tensor", "parents", "joint_map", "extra_joints_idxs")):
            out[name] = (noise * 10).abs().long()
        elif name == "initialized":
            out[name] = torch.tensor(False)
        elif name.endswith("running_var"):
            out[name] = 0.5 + torch.rand(shape, generator=g)
        elif len(shape) > 1 and "embed" not in name.rsplit(".", 2)[-1] and not name.startswith(("mano.", "words")):
            out[name] = noise / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("norm.weight") or "bn" in name and name.endswith("weight"):
            out[name] = 1 + 0.1 * noise
        else:
            out[name] = 0.1 * noise
    return out


def linear(s: dict, p: str, x: Tensor) -> Tensor:
    return x @ s[f"{p}.weight"].T + s.get(f"{p}.bias", 0)


def norm(s: dict, p: str, x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * s[f"{p}.weight"] + s[f"{p}.bias"]


def bn(s: dict, p: str, x: Tensor) -> Tensor:
    scale = s[f"{p}.weight"] / (s[f"{p}.running_var"] + 1e-5).sqrt()
    shift = s[f"{p}.bias"] - s[f"{p}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt d) v for each head's share of the channels, side by side."""
    d = q.shape[-1] // heads
    parts = [slice(i * d, (i + 1) * d) for i in range(heads)]
    return torch.cat([((q[..., p] @ k[..., p].mT) / math.sqrt(d)).softmax(-1) @ v[..., p] for p in parts], -1)


def sixd(x: Tensor) -> Tensor:
    a, b = x.reshape(-1, 16, 2, 3).unbind(2)
    e1 = a / a.norm(dim=-1, keepdim=True)
    b = b - (e1 * b).sum(-1, keepdim=True) * e1
    e2 = b / b.norm(dim=-1, keepdim=True)
    return torch.stack([e1, e2, torch.linalg.cross(e1, e2)], -1)


def vit(s: dict, image: Tensor, heads: int, first: Tensor | None = None) -> Tensor:
    """Normalised image (N,3,256,192) -> tokens, those of `first` in front."""
    w, b = s["backbone.patch_embed.proj.weight"], s["backbone.patch_embed.proj.bias"]
    x = F.conv2d(image, w, b, stride=16, padding=2).flatten(2).mT
    x = x + s["backbone.pos_embed"][:, 1:] + s["backbone.pos_embed"][:, :1]
    if first is not None:
        x = torch.cat([first.expand(len(x), -1, -1), x], 1)
    i = 0
    while f"backbone.blocks.{i}.norm1.weight" in s:
        p = f"backbone.blocks.{i}"
        q, k, v = linear(s, f"{p}.attn.qkv", norm(s, f"{p}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(s, f"{p}.attn.proj", attend(q, k, v, heads))
        x = x + linear(s, f"{p}.mlp.fc2", gelu(linear(s, f"{p}.mlp.fc1", norm(s, f"{p}.norm2", x, 1e-6))))
        i += 1
    return norm(s, "backbone.last_norm", x, 1e-6)


def hamer(s: dict, image: Tensor, heads: int, decoder_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised image -> rotations, betas, camera."""
    context, t, i = vit(s, image, heads), "mano_head.transformer", 0
    x = linear(s, f"{t}.to_token_embedding", image.new_zeros(len(image), 1, 1)) + s[f"{t}.pos_embedding"]
    while f"{t}.transformer.layers.{i}.0.norm.weight" in s:
        p = f"{t}.transformer.layers.{i}"
        q, k, v = linear(s, f"{p}.0.fn.to_qkv", norm(s, f"{p}.0.norm", x, 1e-5)).chunk(3, -1)
        x = linear(s, f"{p}.0.fn.to_out.0", attend(q, k, v, decoder_heads)) + x
        q = linear(s, f"{p}.1.fn.to_q", norm(s, f"{p}.1.norm", x, 1e-5))
        k, v = linear(s, f"{p}.1.fn.to_kv", context).chunk(2, -1)
        x = linear(s, f"{p}.1.fn.to_out.0", attend(q, k, v, decoder_heads)) + x
        x = x + linear(s, f"{p}.2.fn.net.3", gelu(linear(s, f"{p}.2.fn.net.0", norm(s, f"{p}.2.norm", x, 1e-5))))
        i += 1
    h, x = "mano_head", x[:, 0]
    pose = linear(s, f"{h}.decpose", x) + s[f"{h}.init_hand_pose"]
    return (
        sixd(pose),
        linear(s, f"{h}.decshape", x) + s[f"{h}.init_betas"],
        linear(s, f"{h}.deccam", x) + s[f"{h}.init_cam"],
    )


def wilor(s: dict, image: Tensor, heads: int, surface) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised image, and a function of rotations and betas that gives vertices -> rotations, betas, camera."""
    b, r, n = "backbone", "refine_net", len(image)
    means = [s[f"{b}.init_hand_pose"].reshape(1, 16, 6), s[f"{b}.init_betas"][None], s[f"{b}.init_cam"][None]]
    names = ("pose", "shape", "cam")
    first = torch.cat([linear(s, f"{b}.{k}_emb", m) for k, m in zip(names, means, strict=True)], 1)
    x = vit(s, image, heads, first)
    tokens = (x[:, :16], x[:, 16:17], x[:, 17:18])
    state = [linear(s, f"{b}.dec{k}", t) + m for k, t, m in zip(names, tokens, means, strict=True)]
    pose, betas, camera = (v.reshape(n, -1) for v in state)
    vertices = surface(sixd(pose), betas)
    w, bias = s[f"{r}.deconv.first_conv.0.weight"], s[f"{r}.deconv.first_conv.0.bias"]
    grid = F.conv2d(x[:, 18:].mT.reshape(n, -1, 16, 12), w, bias)

    def up(p: str, k: int, y: Tensor) -> Tensor:
        y = F.conv_transpose2d(y, s[f"{r}.deconv.deconv.{p}.{k}.weight"], stride=2, padding=1)
        return bn(s, f"{r}.deconv.deconv.{p}.{k + 1}", y).relu()

    found = []
    for level in (up("1", 3, up("1", 0, grid)), up("0", 0, grid), grid):
        rows, columns = level.shape[-2:]
        z = 2 * 5000 / (rows * camera[:, 0] + 1e-9)
        seen = vertices + torch.stack([camera[:, 1], camera[:, 2], z], -1)[:, None]
        pixel = 5000 / rows * seen[..., :2] / seen[..., 2:]
        found.append(bilinear(level, pixel).amax(1))
    x = torch.cat(found, 1)
    pose = pose + linear(s, f"{r}.dec_pose", x)
    return sixd(pose), betas + linear(s, f"{r}.dec_shape", x), camera + linear(s, f"{r}.dec_cam", x)


def bilinear(maps: Tensor, pixel: Tensor) -> Tensor:
    """maps (N,C,h,w) at pixels (N,V,2), whole numbers at pixel centres, zero outside -> (N,V,C)."""
    padded, n = F.pad(maps, (1, 1, 1, 1)), len(maps)
    limit = pixel.new_tensor([padded.shape[-1] - 2, padded.shape[-2] - 2])
    at = torch.minimum((pixel + 1).clamp_min(0), limit + 0.999)
    low = at.floor().long()
    f, rows = at - low, torch.arange(n)[:, None]
    out = 0
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (f[..., 0] if dx else 1 - f[..., 0]) * (f[..., 1] if dy else 1 - f[..., 1])
            out = out + weight[..., None] * padded.permute(0, 2, 3, 1)[rows, low[..., 1] + dy, low[..., 0] + dx]
    return out


def hrnet(s: dict, x: Tensor) -> tuple[Tensor, Tensor]:
    s = {k.removeprefix("backbone."): v for k, v in s.items() if k.startswith("backbone.")}

    def conv(p: str, x: Tensor, stride: int = 1) -> Tensor:
        w = s[f"{p}.weight"]
        return F.conv2d(x, w, s.get(f"{p}.bias"), stride, w.shape[-1] // 2)

    def bottleneck(p: str, x: Tensor) -> Tensor:
        y = bn(s, f"{p}.bn1", conv(f"{p}.conv1", x)).relu()
        y = bn(s, f"{p}.bn2", conv(f"{p}.conv2", y)).relu()
        y = bn(s, f"{p}.bn3", conv(f"{p}.conv3", y))
        side = bn(s, f"{p}.downsample.1", conv(f"{p}.downsample.0", x)) if f"{p}.downsample.0.weight" in s else x
        return (y + side).relu()

    def layers(p: str, block, x: Tensor) -> Tensor:
        k = 0
        while f"{p}.{k}.conv1.weight" in s:
            x, k = block(f"{p}.{k}", x), k + 1
        return x

    def basic(p: str, x: Tensor) -> Tensor:
        y = bn(s, f"{p}.bn1", conv(f"{p}.conv1", x)).relu()
        return (x + bn(s, f"{p}.bn2", conv(f"{p}.conv2", y))).relu()

    def exchange(p: str, xs: list[Tensor]) -> list[Tensor]:
        xs, out = [layers(f"{p}.branches.{b}", basic, x) for b, x in enumerate(xs)], []
        for i in range(len(xs)):
            parts = []
            for j, y in enumerate(xs):
                q = f"{p}.fuse_layers.{i}.{j}"
                if j > i:
                    y = bn(s, f"{q}.1", conv(f"{q}.0", y))
                    y = y.repeat_interleave(2 ** (j - i), 2).repeat_interleave(2 ** (j - i), 3)
                for k in range(i - j):
                    y = bn(s, f"{q}.{k}.1", conv(f"{q}.{k}.0", y, 2))
                    y = y.relu() if k < i - j - 1 else y
                parts.append(y)
            out.append(sum(parts).relu())
        return out

    x = bn(s, "bn1", conv("conv1", x, 2)).relu()
    x = layers("layer1", bottleneck, bn(s, "bn2", conv("conv2", x, 2)).relu())
    xs = [
        bn(s, "transition1.0.1", conv("transition1.0.0", x)).relu(),
        bn(s, "transition1.1.0.1", conv("transition1.1.0.0", x, 2)).relu(),
    ]
    for stage in (2, 3, 4):
        if stage > 2:
            p = f"transition{stage - 1}.{stage - 1}.0"
            xs = [*xs, bn(s, f"{p}.1", conv(f"{p}.0", xs[-1], 2)).relu()]
        m = 0
        while f"stage{stage}.{m}.branches.0.0.conv1.weight" in s:
            xs, m = exchange(f"stage{stage}.{m}", xs), m + 1
    y = bottleneck("incre_modules.0.0", xs[0])
    for k in range(3):
        down = bn(s, f"downsamp_modules.{k}.1", conv(f"downsamp_modules.{k}.0", y, 2)).relu()
        y = bottleneck(f"incre_modules.{k + 1}.0", xs[k + 1]) + down
    return bn(s, "final_layer.1", conv("final_layer.0", y)).relu().mean((2, 3)), y


def metro(s: dict, image: Tensor, reference: Tensor, adjacency: Tensor | None = None) -> tuple[Tensor, ...]:
    """Normalised image (N,3,224,224), template -> joints, vertices, camera. With an adjacency: Mesh Graphormer."""
    pooled, grid = hrnet(s, image)
    x = torch.cat([reference.expand(len(image), -1, -1), pooled[:, None].expand(-1, len(reference), -1)], 2)
    if adjacency is not None:
        x = torch.cat([x, linear(s, "grid_feat_dim", grid.flatten(2).mT)], 1)
    for i in range(3):
        b, inputs = f"trans_encoder.{i}.bert", x
        x = linear(s, f"{b}.img_embedding", x) + s[f"{b}.position_embeddings.weight"][: x.shape[1]]
        j = 0
        while f"{b}.encoder.layer.{j}.output.dense.weight" in s:
            p = f"{b}.encoder.layer.{j}"
            q, k, v = (linear(s, f"{p}.attention.self.{n}", x) for n in ("query", "key", "value"))
            y = linear(s, f"{p}.attention.output.dense", attend(q, k, v, 4))
            x = norm(s, f"{p}.attention.output.LayerNorm", y + x, 1e-12)
            if f"{p}.graph_conv.conv.weight" in s:
                x = torch.cat([x[:, :21], graph(s, f"{p}.graph_conv", x[:, 21:216], adjacency), x[:, 216:]], 1)
            y = linear(s, f"{p}.output.dense", gelu(linear(s, f"{p}.intermediate.dense", x)))
            x = norm(s, f"{p}.output.LayerNorm", y + x, 1e-12)
            j += 1
        x = linear(s, f"trans_encoder.{i}.cls_head", x) + linear(s, f"trans_encoder.{i}.residual", inputs)
    x = x[:, :216]
    camera = linear(s, "cam_param_fc3", linear(s, "cam_param_fc2", linear(s, "cam_param_fc", x).mT))[:, 0]
    return x[:, :21], linear(s, "upsampling", x[:, 21:].mT).mT, camera


def graph(s: dict, p: str, x: Tensor, adjacency: Tensor) -> Tensor:
    y = norm(s, f"{p}.pre_norm", x, 1e-12).relu() @ s[f"{p}.lin1.W"].T + s[f"{p}.lin1.b"]
    y = adjacency @ (norm(s, f"{p}.norm1", y, 1e-12).relu() @ s[f"{p}.conv.weight"]) + s[f"{p}.conv.bias"]
    return x + norm(s, f"{p}.norm2", y, 1e-12).relu() @ s[f"{p}.lin2.W"].T + s[f"{p}.lin2.b"]
