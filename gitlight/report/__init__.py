"""What an evaluation leaves: metrics.json, per_image.csv, reconstructions.png and report.html."""
