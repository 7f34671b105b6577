"""In place of flash-attn 2, which cannot be built without a card: two functions that check what they get."""
