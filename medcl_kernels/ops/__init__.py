"""Operations on rows `(B, D, L)`: one file each with schema, fake kernel and gradient."""
