"""Two servers compared as users see them: stock, fused and stock again, by the engine's own client."""
