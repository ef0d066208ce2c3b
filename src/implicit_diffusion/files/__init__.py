"""Files on disk: atomic writing, guarded reading, states without pickles, fingerprints, locks."""
