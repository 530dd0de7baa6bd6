"""The experiments of Norm Tweaking (arXiv 2309.02784) on whatever model is given: `normtweak paper`."""
