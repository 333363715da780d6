import { defineConfig } from "vite";

// The page is asked for below any prefix, so everything in it is named relative to it. Nothing becomes part
// of the page itself (`data:` addresses), which the security policy of the server forbids.
export default defineConfig({
  base: "./",
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: "../priv/web",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: false,
  },
});
