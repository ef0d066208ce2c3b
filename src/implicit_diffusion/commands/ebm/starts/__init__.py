"""What an energy-based model may learn before its particles take over."""
