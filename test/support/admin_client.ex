defmodule VLLM.AdminClient do
  @moduledoc "Asks the admin API, without a server."

  alias VLLM.{JSON, OpenAI, Options, Web}

  @doc "What serves these options, with the page and the admin API."
  def core!(options \\ []) do
    {:ok, known} = Options.only([web: true] ++ options, Options.server())
    {:ok, core} = OpenAI.new(known, make_ref())
    core
  end

  @doc "The status and what the JSON of an answer says; nil where there is none."
  def get(core, path, headers \\ []), do: ask(core, "GET", path, "", headers)

  def post(core, path, body, headers \\ []) do
    body = if is_binary(body), do: body, else: JSON.encode(body)
    ask(core, "POST", path, body, [{"content-type", "application/json"} | headers])
  end

  def delete(core, path, headers \\ []),
    do: ask(core, "DELETE", path, "", [{"x-requested-with", "vllm"} | headers])

  def ask(core, method, path, body, headers) do
    {status, _headers, body} = answer(core, method, path, body, headers)

    if body == "" do
      {status, nil}
    else
      {:ok, term} = JSON.decode(body)
      {status, term}
    end
  end

  @doc "The answer as the server has it; a path may be relative to that of the API, and have a query."
  def answer(core, method, path, body \\ "", headers \\ []) do
    path = if String.starts_with?(path, "/"), do: path, else: "/api/v1/" <> path

    {path, query} =
      case String.split(path, "?", parts: 2) do
        [path, query] -> {path, query}
        [path] -> {path, ""}
      end

    request = %{method: method, path: path, query: query, headers: headers, body: body}
    # What is refused before the body is there is refused then.
    with nil <- Web.refused(core, request), do: Web.answer(core, request)
  end

  @doc "The headers of a key."
  def with_key(key), do: [{"authorization", "Bearer #{key}"}]
end
