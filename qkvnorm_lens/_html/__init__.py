"""Parts of HTML pages: text that is safe to show, data that is safe to embed, pictures as SVG."""
