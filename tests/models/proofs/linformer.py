"""Linformer: columns of E and F for the real positions alone."""

from proofs.faults import attention_faults
from proofs.kit import attention, by_head


@by_head
def reference(module, head, q, k, v, real):
    e, f = (p[head if p.shape[0] > 1 else 0][:, real] for p in (module.proj_k, module.proj_v))
    return attention(q, e @ k[real], f @ v[real])


CASES = [{}, *({"proj_len": 8, "share": share} for share in ("none", "heads", "kv", "layers"))]

FAULTS = attention_faults("linformer_attention", proj_len=8)
