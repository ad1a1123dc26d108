"""Our layers against public implementations of the same mechanism: forward and backward, one run, one card.

Both get the same x [b l d_model], bf16 autocast or float32 where theirs cannot; ratio = theirs over ours.
usage: python scripts/bench_public.py [NAME ...] [--length N] [--batch-size B] [--widths W W] [-o FILE.jsonl]
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lra import environment, registry
from lra.conformance_subject import Subject
from lra.layer_cost import captured_ms, seconds, training_step

# w width, h heads, n length


def multihead(w: int, h: int, n: int) -> nn.Module:
    class SelfAttention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    return SelfAttention(w, h, batch_first=True)


def performer(w, h, n):
    from performer_pytorch import SelfAttention

    return SelfAttention(w, heads=h, dim_head=w // h, nb_features=256, causal=False)


def linear(w, h, n):
    from linear_attention_transformer.linear_attention_transformer import SelfAttention

    return SelfAttention(w, heads=h, causal=False)


def linformer(w, h, n):
    from linformer import LinformerSelfAttention

    return LinformerSelfAttention(w, n, k=256, heads=h)


def nystrom(w, h, n):
    from nystrom_attention import NystromAttention

    return NystromAttention(w, dim_head=w // h, heads=h, num_landmarks=64, residual_conv_kernel=35)


def local(w, h, n):
    from local_attention.transformer import LocalMHA

    return LocalMHA(dim=w, window_size=32, heads=h, dim_head=w // h, causal=False, use_rotary_pos_emb=False)


def reformer(w, h, n):
    from reformer_pytorch import LSHSelfAttention

    return LSHSelfAttention(w, heads=h, bucket_size=64, n_hashes=2, return_attn=False)


def routing(w, h, n):
    from routing_transformer.routing_transformer import SelfAttention

    options = {"causal": False, "window_size": 128, "attn_dropout": 0.0, "dropout": 0.0}
    layer = SelfAttention(w, 1, n, heads=h, local_attn_heads=h // 2, local_attn_window_size=128, **options)

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)[0]

    return First()


def sinkhorn(w, h, n):
    from sinkhorn_transformer.sinkhorn_transformer import SinkhornSelfAttention

    return SinkhornSelfAttention(w, 64, n, heads=h, causal=False)


def h_transformer(w, h, n):
    from h_transformer_1d.h_transformer_1d import HAttention1D

    return HAttention1D(w, heads=h, dim_head=w // h, block_size=16)


class _WithMask(nn.Module):
    """A layer of the package transformers, given the mask that says all tokens are real."""

    def __init__(self, layer: nn.Module, call: Callable) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


def longformer(w, h, n):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=w, num_attention_heads=h, attention_window=[512], attention_probs_dropout_prob=0.0
    )
    layer = LongformerSelfAttention(config, 0)

    def call(layer, x):
        mask = x.new_zeros(x.shape[:2])
        real = mask.bool()
        return layer(
            x,
            attention_mask=mask,
            is_index_masked=real,
            is_index_global_attn=real,
            is_global_attn=False,
        )[0]

    return _WithMask(layer, call)


def bigbird(w, h, n):
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=w, num_attention_heads=h, block_size=64, num_random_blocks=3, max_position_embeddings=n
    )
    layer = BigBirdBlockSparseAttention(config, seed=0)

    def call(layer, x):
        mask = torch.ones(x.shape[:2], device=x.device)
        blocked, band, first, last = BigBirdModel.create_masks_for_block_sparse_attn(mask, 64)
        return layer(x, band, first, last, blocked, blocked)[0]

    return _WithMask(layer, call)


def yoso(w, h, n):
    from transformers import YosoConfig
    from transformers.models.yoso.modeling_yoso import YosoSelfAttention

    config = YosoConfig(
        hidden_size=w, num_attention_heads=h, use_expectation=True, attention_probs_dropout_prob=0.0
    )
    layer = YosoSelfAttention(config)

    def call(layer, x):
        return layer(x, torch.zeros(x.shape[0], 1, 1, n, device=x.device))[0]

    return _WithMask(layer, call)


def fnet(w, h, n):
    class Fourier(nn.Module):
        def forward(self, x):
            return torch.fft.fftn(x.float(), dim=(1, 2)).real

    return Fourier()


PUBLIC = {
    "softmax": ("torch.nn.MultiheadAttention", multihead, {}),
    "linear": ("linear-attention-transformer", linear, {}),
    "performer": ("performer-pytorch", performer, {}),
    "linformer": ("linformer", linformer, {}),
    "nystrom": ("nystrom-attention", nystrom, {}),
    "local": ("local-attention", local, {"window": 64}),
    "reformer": ("reformer-pytorch", reformer, {}),
    "routing": ("routing-transformer", routing, {}),
    "sinkhorn": ("sinkhorn-transformer", sinkhorn, {"block_size": 64}),
    "h_transformer": ("h-transformer-1d", h_transformer, {}),
    "longformer": ("transformers", longformer, {}),
    "bigbird": ("transformers", bigbird, {}),
    "yoso": ("transformers", yoso, {"expectation": True}),
    "fnet": ("torch.fft", fnet, {}),
}


def compare(name: str, width: int, length: int, batch_size: int, device: str) -> dict:
    source, build, own = PUBLIC[name]
    heads = max(2, width // 64)
    row = {"model": name, "own": own, "width": width, "length": length, "batch_size": batch_size}
    row["public"] = source
    sizes = {"max_len": length, "d_model": width, "num_heads": heads, "device": device}
    subject = Subject(name, registry.get(name), own, **sizes)
    x = subject.inputs(batch_size, length, dtype=torch.float32).requires_grad_()
    for precision in ("bf16", "fp32"):
        try:
            theirs = training_step(build(width, heads, length).to(device).train(), x, precision)
            row |= {"precision": precision, "public_ms": 1e3 * seconds(theirs)}
            break
        except Exception as error:
            row["public_error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:120]
    if "public_ms" in row:
        row.pop("public_error", None)
    precision = row.setdefault("precision", "bf16")
    try:
        ours = training_step(subject.probe(dtype=torch.float32, stirred=False).first.train(), x, precision)
        row["ours_ms"] = 1e3 * seconds(ours)
        row["ours_captured_ms"] = captured_ms(ours)
    except Exception as error:
        row["ours_error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:120]
    if "public_ms" in row and "ours_ms" in row:
        row["ratio"] = row["public_ms"] / row["ours_ms"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PUBLIC)} (default: all)")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    device = environment.pick_device("auto")
    about = {"device": environment.device_name(device), "torch": torch.__version__}
    about["git_revision"] = environment.git_revision()
    rows = []
    if unknown := set(arguments.names) - set(PUBLIC):
        parser.error(f"nothing to compare {', '.join(unknown)} with; choose from: {', '.join(PUBLIC)}")
    for width in arguments.widths:
        for name in arguments.names or PUBLIC:
            row = compare(name, width, arguments.length, arguments.batch_size, str(device)) | about
            rows.append(row)
            cells = [f"{row[key]:.2f}" if row.get(key) else "-" for key in KEYS]
            said = row.get("public_error") or row.get("ours_error") or ""
            print(f"{name:<14} width {width:<4} {row['precision']} {' '.join(cells)}  {row['public']} {said}")
            if arguments.output:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text("".join(json.dumps(r) + "\n" for r in rows))
            if device.type == "cuda":
                torch.cuda.empty_cache()

    return 0 if all("ratio" in row for row in rows) else 1


KEYS = ("public_ms", "ours_ms", "ours_captured_ms", "ratio")

if __name__ == "__main__":
    sys.exit(main())
