"""Tables of URLs, before they are images: what to fetch, from billions of crawled rows, and the fetching."""
