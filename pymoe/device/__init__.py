"""What stands between the arrays a caller hands over and the code that runs on them."""
