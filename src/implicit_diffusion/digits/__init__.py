"""The handwritten digits that ship with the package: data, classifiers, and the quality of samples."""
