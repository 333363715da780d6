defmodule VLLM.Web do
  @moduledoc false
  # The admin API and its page, without a server, and in front of what VLLM.OpenAI
  # serves: a request in, an answer out. `VLLM.Web.Routes` has all there is; who
  # may ask, and in which form, is looked at here for all of it.

  alias VLLM.{JSON, OpenAI}
  alias VLLM.OpenAI.Refusal
  alias VLLM.Web.{Answer, Assets, OpenAPI, Routes, Schema}

  # Methods that change nothing.
  @safe ["GET", "HEAD"]

  @doc "The answer to a request: of the page, of the admin API, or of OpenAI's."
  @spec answer(OpenAI.t(), OpenAI.request()) :: OpenAI.answer()
  def answer(%{web: true} = core, request) do
    cond do
      Assets.serves?(request.path) -> page(request)
      api?(request.path) -> core |> api(request) |> answered()
      true -> OpenAI.answer(core, request)
    end
  end

  def answer(core, request), do: OpenAI.answer(core, request)

  @doc """
  The answer to a request that will not be served whatever its body is, so that nobody needs to read it; nil
  for others.
  """
  @spec refused(OpenAI.t(), OpenAI.request()) :: OpenAI.answer() | nil
  def refused(%{web: true} = core, request) do
    cond do
      Assets.serves?(request.path) -> page(request)
      api?(request.path) -> with {:ok, _matched} <- admitted(core, request), do: nil
      true -> OpenAI.refused(core, request)
    end
    |> answered()
  end

  def refused(core, request), do: OpenAI.refused(core, request)

  @doc "The answer to a request that the server itself refuses, in the shape that its path has for errors."
  @spec refusal(OpenAI.t(), OpenAI.request(), Refusal.t()) :: OpenAI.answer()
  def refusal(core, request, refusal) do
    if core.web and api?(request.path),
      do: Answer.refusal(refusal.status, refusal.code, refusal.message, refusal.headers),
      else: Refusal.answer(refusal)
  end

  defp answered({:error, answer}), do: answer
  defp answered(answer), do: answer

  defp api?(path), do: String.starts_with?(path, "/api/")

  # It holds no data, so that nobody is asked for a key.
  defp page(%{method: method, path: path}) when method in @safe, do: Assets.answer(path)
  defp page(_request), do: no_method(["GET"])

  defp api(core, request) do
    with {:ok, {route, params}} <- admitted(core, request),
         {:ok, query} <- query(route, request.query),
         {:ok, body} <- body(route, request.body) do
      route |> run(%{core: core, params: params, query: query, body: body}) |> for_method(request)
    end
  end

  # The front would wait for the end of what it does not send. Left early, it gives back what it has.
  defp for_method({status, headers, body}, %{method: "HEAD"}) when not is_binary(body) do
    _ = Enum.take(body, 1)
    {status, headers, ""}
  end

  defp for_method(answer, _request), do: answer

  # Who asks, then in which form, then for what: a path that is none is nobody's affair without a key.
  defp admitted(core, request) do
    with :ok <- admin(core, request),
         :ok <- own_page(request),
         do: find(request)
  end

  defp admin(core, request) do
    case OpenAI.who(core, request.headers) do
      {:ok, %{admin: true}} ->
        :ok

      {:ok, _client} ->
        {:error, Answer.refusal(403, :forbidden, "This key may not use the admin API.")}

      {:error, _refusal} ->
        {:error, no_key()}
    end
  end

  defp no_key do
    Answer.refusal(
      401,
      :no_key,
      "No API key, or a wrong one: `Authorization: Bearer KEY`, with a key of an admin.",
      [{"www-authenticate", "Bearer"}]
    )
  end

  # A page of another host can have a browser send what a form can, and no more without being asked: so
  # what changes something is sent as no form can, and by no such page.
  defp own_page(request) do
    cond do
      not own_origin?(request.headers) ->
        {:error,
         Answer.refusal(403, :wrong_origin, "The request comes from a page of another host.")}

      request.method in @safe or unlike_a_form?(request) ->
        :ok

      request.method == "DELETE" ->
        {:error,
         Answer.refusal(403, :no_header, "Send the header `X-Requested-With: vllm` along.")}

      true ->
        message = "Send the body as JSON, with `Content-Type: application/json`."
        {:error, Answer.refusal(403, :no_json, message)}
    end
  end

  defp unlike_a_form?(%{method: "DELETE", headers: headers}),
    do: List.keymember?(headers, "x-requested-with", 0)

  defp unlike_a_form?(%{headers: headers}) do
    case List.keyfind(headers, "content-type", 0) do
      {_name, type} -> type =~ ~r/\A\s*application\/json\s*(;|\z)/i
      nil -> false
    end
  end

  defp own_origin?(headers) do
    case List.keyfind(headers, "origin", 0) do
      nil ->
        true

      {_name, origin} ->
        host(origin) ==
          with {_name, host} <- List.keyfind(headers, "host", 0), do: downcased(host)
    end
  end

  # What is none, such as `null`, is no host's.
  defp host(origin) do
    case Regex.run(~r/\Ahttps?:\/\/([^\/]+)\z/i, origin) do
      [_origin, host] -> downcased(host)
      nil -> :none
    end
  end

  defp downcased(host), do: String.downcase(host, :ascii)

  defp find(request) do
    method = if request.method == "HEAD", do: "GET", else: request.method

    case Routes.match(request.path) do
      [] ->
        {:error,
         Answer.refusal(
           404,
           :not_found,
           "There is nothing at this path; `/api/v1/openapi.json` lists all."
         )}

      found ->
        case Enum.find(found, fn {route, _params} -> route.method == method end) do
          nil -> {:error, no_method(found)}
          match -> {:ok, match}
        end
    end
  end

  # A path that is one of the description's is not told as the name that it could be, too.
  defp no_method(found) do
    own = for {route, params} <- found, params == %{}, do: route.method
    all = for {route, _params} <- found, do: route.method
    allowed = Enum.join(if(own == [], do: all, else: own), ", ")
    message = "This path takes #{allowed} and no other method."
    Answer.refusal(405, :method_not_allowed, message, [{"allow", allowed}])
  end

  ## What is asked

  defp query(route, text) do
    types = Map.new(route.query, fn {name, schema} -> {Atom.to_string(name), schema} end)

    given =
      Map.new(URI.decode_query(text), fn {name, value} -> {name, typed(types[name], value)} end)

    defaults = for {name, %{default: default}} <- types, into: %{}, do: {name, default}
    schema = %{type: "object", properties: route.query, additionalProperties: false}

    case Schema.check(schema, given) do
      {:ok, values} -> {:ok, Map.merge(defaults, values)}
      {:error, error} -> {:error, Answer.error(error)}
    end
  end

  # What is of no type is said to be none.
  defp typed(%{type: "integer"}, text) do
    case Integer.parse(text) do
      {number, ""} -> number
      _none -> text
    end
  end

  defp typed(%{type: "boolean"}, text) when text in ["true", "false"], do: text == "true"
  defp typed(_schema, text), do: text

  defp body(%{body: nil}, _text), do: {:ok, %{}}

  defp body(%{body: schema}, text) do
    with {:ok, term} <- JSON.decode(text),
         {:ok, body} <- Schema.check(schema, term) do
      {:ok, body}
    else
      :error -> {:error, Answer.refusal(400, :malformed, "The body is not JSON.")}
      {:error, error} -> {:error, Answer.error(error)}
    end
  end

  defp run(%{run: :describe}, _asked), do: Answer.json(200, OpenAPI.document(Routes.all()))

  defp run(%{run: run, status: status}, asked) do
    case run.(asked) do
      {:ok, term} ->
        Answer.json(status, term)

      :ok ->
        Answer.none()

      {:events, pieces} ->
        Answer.events(pieces)

      :none ->
        Answer.refusal(404, :not_found, "There is no engine of this id, or no such replica.")

      {:error, error} ->
        Answer.error(error)
    end
  end
end
