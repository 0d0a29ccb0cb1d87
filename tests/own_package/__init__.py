"""A user's own package: a linear map learned by regression, in the settings of
Maestro's theory, where every prefix of the factors becomes the truncated SVD."""
