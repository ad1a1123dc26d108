"""Softmax attention: weights over the real keys."""

from proofs.faults import attention_faults
from proofs.kit import attention, by_head


@by_head
def reference(module, head, q, k, v, real):
    return attention(q, k[real], v[real])


CASES = [{"kernel": "fused"}, {"kernel": "math"}]

FAULTS = attention_faults("softmax_fused", kernel="fused")
