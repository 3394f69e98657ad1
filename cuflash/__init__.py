"""FlashAttention for CuPy and NumPy arrays, without PyTorch.

out = cuflash.attention(q, k, v, causal=True)
out, pullback = cuflash.attention_vjp(q, k, v, causal=True)
"""

from __future__ import annotations

from cuflash._attention import attention
from cuflash._blockmask import BlockMask
from cuflash._dropout import dropout_mask
from cuflash._errors import CompileError, UnsupportedError
from cuflash._explain import explain
from cuflash._gradient import attention_backward, attention_vjp
from cuflash._merge import merge_attention
from cuflash._scoremod import ScoreMod
from cuflash._system import show_config
from cuflash._varlen import attention_varlen, attention_varlen_backward, attention_varlen_vjp
from cuflash._warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "CompileError",
    "ScoreMod",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_varlen_vjp",
    "attention_vjp",
    "dropout_mask",
    "explain",
    "merge_attention",
    "show_config",
    "warmup",
]
