"""The figures and claims of Menary, Kaski and Freitas (arXiv 2406.17837)."""
