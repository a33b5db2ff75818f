"""Groups that the content decides: tokens are gathered by index, and put back as the mean of their groups."""
