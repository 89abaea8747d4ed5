"""The chunks in which a GPU computes logits, see `fused_cross_entropy`, which can only be imported where Triton is."""

CHUNK_LOGITS = 2**26  # 128 MiB in 16 bit; more rows than keep a GPU busy
_ROW_TILE = 128  # a chunk has a multiple of this number of rows, and matrix products have whole tiles
_ALIGNMENT = 64  # a row of logits starts at a multiple, in elements: matrix products are slow on others


def chunk_rows(vocabulary: int, logits: int = CHUNK_LOGITS) -> int:
    """C, how many rows are computed at once. `logits`: in a chunk, about."""
    return max(1, logits // vocabulary // _ROW_TILE) * _ROW_TILE


def row_stride(vocabulary: int) -> int:
    """Elements from the start of one row of logits to the next."""
    return -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
