defmodule VLLM.Web.Assets do
  @moduledoc false
  # The page and its files, from priv/web. Which there are is looked at once, and
  # what is asked for is one of these by its whole name or none: no path leads
  # anywhere else.

  alias VLLM.Web.Answer

  # Its scripts and styles are files of this server, and so is all that it asks for.
  @policy "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " <>
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

  @headers [
    {"content-security-policy", @policy},
    {"x-content-type-options", "nosniff"},
    {"referrer-policy", "no-referrer"},
    {"cross-origin-opener-policy", "same-origin"}
  ]

  @types %{
    ".html" => "text/html; charset=utf-8",
    ".js" => "text/javascript; charset=utf-8",
    ".css" => "text/css; charset=utf-8",
    ".svg" => "image/svg+xml",
    ".png" => "image/png",
    ".webp" => "image/webp",
    ".woff2" => "font/woff2"
  }

  @doc "Whether a path is the page's or one of its files'."
  @spec serves?(String.t()) :: boolean()
  def serves?(path), do: path in ["/", "/favicon.svg"] or String.starts_with?(path, "/assets/")

  @doc "The answer to a request for one of them."
  @spec answer(String.t()) :: VLLM.OpenAI.answer()
  def answer(path) do
    case files() do
      %{^path => {headers, body}} -> {200, headers, body}
      _none -> Answer.refusal(404, :not_found, missing(path))
    end
  end

  defp missing("/"), do: "The page is not here: this version was packed without `priv/web`."
  defp missing(_path), do: "There is no such file."

  @doc "Reads them, as a start does."
  @spec files() :: %{String.t() => {[{String.t(), String.t()}], binary()}}
  def files do
    with nil <- :persistent_term.get(__MODULE__, nil) do
      files = read(Application.app_dir(:ex_vllm, "priv/web"))
      :persistent_term.put(__MODULE__, files)
      files
    end
  end

  @doc "The files of a folder that are served, by their paths."
  @spec read(Path.t()) :: %{String.t() => {[{String.t(), String.t()}], binary()}}
  def read(folder) do
    paths = ["index.html", "favicon.svg" | assets(folder)]

    for path <- paths, {:ok, body} <- [File.read(Path.join(folder, path))], into: %{} do
      served = if path == "index.html", do: "/", else: "/" <> path
      {served, {[{"content-type", type(path)}, {"cache-control", kept(path)} | @headers], body}}
    end
  end

  defp assets(folder) do
    for path <- Path.wildcard(Path.join(folder, "assets/*")),
        is_map_key(@types, Path.extname(path)),
        do: Path.join("assets", Path.basename(path))
  end

  defp type(path), do: @types[Path.extname(path)]

  # Their names have a digest of what is in them.
  defp kept("assets/" <> _name), do: "public, max-age=31536000, immutable"
  defp kept(_path), do: "no-cache"
end
