"""Rules that make less of a step on θ than the optimizer proposes."""
