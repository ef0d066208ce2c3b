"""Where the training of a potential may start: from the scores of data, before there are particles."""
