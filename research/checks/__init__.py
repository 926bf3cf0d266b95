"""Long checks of promises, of which the test suite runs a sample."""
