if Code.ensure_loaded?(Plug.Conn) do
  defmodule VLLM.Web.Plug do
    @moduledoc """
    Serves the admin API and its page in an application of yours that has Plug, behind its own authentication,
    and OpenAI's API beside them.

        scope "/" do
          pipe_through :only_operators
          forward "/llm", VLLM.Web.Plug, models: [MyApp.LLM]
        end

    The page is at `/llm/` then, the admin API at `/llm/api/v1/`, and `VLLM.Plug`'s paths at `/llm/v1/`. It takes
    the options of `VLLM.Plug`, also as a function; `models:` may be left out.

    Whoever passes your authentication may start, stop and delete: with `api_keys:` a key with `admin: true` is
    asked for as well. The parsers of your endpoint must have `:json` among them, or none at all. See
    guides/serving.md.
    """

    @behaviour Plug

    @more %{web: true}

    @impl Plug
    def init(options) when is_function(options, 0), do: options
    def init(options), do: VLLM.Plug.checked(options, @more)

    @impl Plug
    def call(conn, options) when is_function(options, 0),
      do: call(conn, VLLM.Plug.checked(options.(), @more))

    def call(conn, {core, limit}) do
      path = "/" <> Enum.join(conn.path_info, "/")

      # The page asks for all else relative to where it is, which must end like a folder.
      if path == "/" and not String.ends_with?(conn.request_path, "/"),
        do: conn |> moved(conn.request_path <> "/") |> Plug.Conn.halt(),
        else: VLLM.Plug.serve(conn, core, limit, path)
    end

    defp moved(conn, to) do
      conn
      |> Plug.Conn.put_resp_header("location", to)
      |> Plug.Conn.send_resp(308, "")
    end
  end
end
