if Code.ensure_loaded?(Plug.Conn) do
  defmodule VLLM.Plug do
    @moduledoc """
    Serves engines as OpenAI's API in an application of yours that has Plug, behind its own authentication.

        forward "/v1", VLLM.Plug, models: [MyApp.LLM]

    It is what `VLLM.Server` serves, without its server: the same requests, limits and errors. A body that a
    parser of your endpoint has read already is taken from `conn.body_params`. See guides/serving.md.

    ## Options

    #{VLLM.Options.docs(VLLM.Options.plug())}

    Options that are known at run time only (keys) are given as a function without arguments that returns
    them: `forward "/v1", VLLM.Plug, &MyApp.openai_options/0`. `init/1` raises a `VLLM.Error` for options that
    are wrong; those of a function are checked at each request.
    """

    @behaviour Plug

    alias VLLM.{Error, JSON, OpenAI, Options, Web}
    alias VLLM.OpenAI.Refusal

    @impl Plug
    def init(options) when is_function(options, 0), do: options

    def init(options), do: checked(options, %{})

    @impl Plug
    def call(conn, options) when is_function(options, 0), do: call(conn, checked(options.(), %{}))
    def call(conn, {core, limit}), do: serve(conn, core, limit, path(core, conn))

    @doc false
    # What a Plug of this library serves, of its options and of what it adds to them.
    def checked(options, more) do
      known = options |> Options.only(Options.plug()) |> Error.bang!()
      id = {__MODULE__, :erlang.phash2({options, more})}
      core = known |> Map.merge(more) |> OpenAI.new(id) |> Error.bang!()
      {core, known.max_body_bytes}
    end

    @doc false
    # Answers a request for a path of what is served.
    def serve(conn, core, limit, path) do
      request = %{
        method: conn.method,
        path: path,
        query: conn.query_string,
        headers: conn.req_headers,
        body: ""
      }

      {answer, conn} =
        with nil <- Web.refused(core, request),
             {:ok, body, conn} <- body(conn, limit) do
          {Web.answer(core, %{request | body: body}), conn}
        else
          {:more, _part, conn} -> {Web.refusal(core, request, Refusal.too_large(limit)), conn}
          {:error, _closed_or_late} -> {Web.refusal(core, request, Refusal.no_body()), conn}
          # Nobody reads a body that helps nothing.
          refused -> {refused, conn}
        end

      conn |> answer(answer) |> Plug.Conn.halt()
    end

    defp body(%{body_params: %{__struct__: Plug.Conn.Unfetched}} = conn, limit),
      do: Plug.Conn.read_body(conn, length: limit)

    defp body(conn, _limit), do: {:ok, JSON.encode(conn.body_params), conn}

    # Where it is forwarded to `/v1`, that is no more in the path.
    defp path(core, conn) do
      path = "/" <> Enum.join(conn.path_info, "/")
      whole? = String.starts_with?(path, "/v1/") or path in OpenAI.paths(core)
      if whole?, do: path, else: "/v1" <> path
    end

    defp answer(conn, {status, headers, body}) do
      conn =
        Enum.reduce(headers, conn, fn {name, value}, conn ->
          Plug.Conn.put_resp_header(conn, name, value)
        end)

      if is_binary(body),
        do: Plug.Conn.send_resp(conn, status, body),
        else: Enum.reduce_while(body, Plug.Conn.send_chunked(conn, status), &chunk/2)
    end

    defp chunk(piece, conn) do
      case Plug.Conn.chunk(conn, piece) do
        {:ok, conn} -> {:cont, conn}
        {:error, _closed} -> {:halt, conn}
      end
    end
  end
end
