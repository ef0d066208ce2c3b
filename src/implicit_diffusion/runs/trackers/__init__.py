"""Trackers: where a run shows its numbers and pictures besides its own folder, while it trains.

    lines of metrics.jsonl ─┐
    pictures ───────────────┴─► Tracking ─► TensorBoard's event files, Weights & Biases

The folder comes first: a tracker gets what metrics.jsonl has got, and when a run goes back to its checkpoint, the
trackers go back with the file. They read no random number of a run and give it none.
"""
