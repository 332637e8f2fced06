"""Metrics and pictures of edits: PSNR, object match, drift, contact sheets, loss curves."""
