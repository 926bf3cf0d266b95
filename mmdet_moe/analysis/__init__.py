"""What the experts of a trained model do: records of its predictions, statistics, and a report."""
