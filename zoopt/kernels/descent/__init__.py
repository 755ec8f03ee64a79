"""Updates that are more than a sum of directions: with shaped, averaged or signed estimates."""
