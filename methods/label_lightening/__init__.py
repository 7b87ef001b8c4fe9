"""Methods whose contribution is small labels: LPLD and LPQLD prune them, HeLlO replaces them by a projector."""
