import { render } from "preact";
import { App } from "./app";
import "./styles/base.css";
import "./styles/parts.css";
import "./styles/pages.css";
import { applyTheme } from "./theme";

applyTheme();
render(<App />, document.getElementById("page")!);
