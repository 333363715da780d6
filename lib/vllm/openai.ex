defmodule VLLM.OpenAI do
  @moduledoc false
  # What is served over HTTP, without a server: who may ask, for which model,
  # what is passed on to vLLM's own API app and what is answered here. A front
  # (VLLM.Server, VLLM.Plug) hands over a request and sends what it gets.

  alias VLLM.{AllowedModels, Error, Exchange, JSON, Metrics, Options, Places}
  alias VLLM.Bridge.{Deadline, MessagePack}
  alias VLLM.Engine.Call
  alias VLLM.OpenAI.{Body, Models, Refusal}

  # Keys are known by their digests only; these too are shown to nobody.
  @derive {Inspect, except: [:keys]}
  @enforce_keys [:id, :models, :keys, :everybody, :timeout, :queue_timeout, :tokenize] ++
                  [:metrics, :metrics_without_key, :web]
  defstruct @enforce_keys

  @type client :: %{
          id: term(),
          allowed_models: [AllowedModels.pattern()] | nil,
          max_concurrent_requests: pos_integer() | nil,
          admin: boolean()
        }

  @type t :: %__MODULE__{
          id: term(),
          models: [Models.entry()],
          keys: [{digest :: binary(), client()}] | nil,
          everybody: client(),
          timeout: timeout(),
          queue_timeout: timeout(),
          tokenize: boolean(),
          metrics: boolean(),
          metrics_without_key: boolean(),
          web: boolean()
        }

  @type request :: %{
          method: String.t(),
          path: String.t(),
          query: String.t(),
          headers: [{String.t(), String.t()}],
          body: binary()
        }

  @typedoc """
  An answer. The body is whole, or an enumerable of pieces, which must be read once, by the process
  that asked; leaving it early cancels the request, and it raises where it breaks off.
  """
  @type answer :: {100..599, [{String.t(), String.t()}], binary() | Enumerable.t()}

  # What is passed on, and which runner of vLLM's has it. Whatever else the app
  # would answer is none of a client's business.
  @paths %{
    "/v1/completions" => "generate",
    "/v1/chat/completions" => "generate",
    "/v1/responses" => "generate",
    "/v1/messages" => "generate",
    "/v1/messages/count_tokens" => "generate",
    "/v1/embeddings" => "pooling",
    "/v1/score" => "pooling",
    "/score" => "pooling",
    "/v1/rerank" => "pooling",
    "/v2/rerank" => "pooling",
    "/rerank" => "pooling"
  }
  @tokenize %{"/tokenize" => :any, "/detokenize" => :any}

  # Of the request's headers; the client's key stays here.
  @passed_on ~w(content-type traceparent tracestate)

  # Of the answer's; vectors as bytes are told apart by their metadata.
  @passed_back ~w(content-type metadata)

  # Where a prompt begins, and how many bytes of it tell which replica has it in its cache.
  @prompts ~w(messages prompt input query)
  @beginning 256

  @doc "All paths that are served."
  @spec paths(t()) :: [String.t()]
  def paths(core), do: own(core) ++ Map.keys(passed_on(core))

  # What is answered here.
  defp own(%{metrics: true}), do: ["/health", "/v1/models", "/metrics"]
  defp own(_core), do: ["/health", "/v1/models"]

  defp passed_on(%{tokenize: true}), do: Map.merge(@paths, @tokenize)
  defp passed_on(_core), do: @paths

  @doc "What is to be served, of options that are checked; `id` tells it from others."
  @spec new(%{atom() => term()}, term()) :: {:ok, t()} | {:error, Error.t()}
  def new(options, id) do
    web? = Map.get(options, :web, false)

    with {:ok, models} <- entries(options.models, web?),
         {:ok, keys} <- keys(options.api_keys, id) do
      {:ok,
       %__MODULE__{
         id: id,
         models: models,
         keys: keys,
         everybody: client({id, :everybody}, options),
         timeout: options.timeout,
         queue_timeout: options.queue_timeout,
         tokenize: options.tokenize,
         metrics: options.metrics,
         metrics_without_key: options.metrics_without_key,
         web: web?
       }}
    end
  end

  # Engines may be started there.
  defp entries(none, true) when none in [nil, []], do: {:ok, []}
  defp entries(given, _web?), do: Models.entries(given)

  # Where nobody is asked for a key, everybody may do everything.
  defp client(id, options) do
    %{
      id: id,
      allowed_models: options.allowed_models,
      max_concurrent_requests: options.max_concurrent_requests,
      admin: Map.get(options, :admin, true)
    }
  end

  defp keys(nil, _id), do: {:ok, nil}

  defp keys(given, id) when is_list(given) or is_map(given) do
    given
    |> Enum.reduce_while({:ok, []}, fn given, {:ok, keys} ->
      with {key, options} <- with_options(given),
           {:ok, _key} <- Options.check(:string, :api_keys, key),
           {:ok, options} <- Options.only(options, Options.api_key()) do
        digest = :crypto.hash(:sha256, key)
        {:cont, {:ok, [{digest, client({id, digest}, options)} | keys]}}
      else
        # What was given is not shown.
        _wrong -> {:halt, no_keys()}
      end
    end)
  end

  defp keys(_given, _id), do: no_keys()

  defp with_options({key, options}), do: {key, options}
  defp with_options(key), do: {key, []}

  defp no_keys do
    {:error,
     Error.new(
       :invalid_option,
       "`api_keys` must be a list of strings that are not empty, or of `{key, options}` with the options " <>
         "`allowed_models:`, `max_concurrent_requests:` and `admin:`.",
       %{"option" => "api_keys"}
     )}
  end

  @doc "The answer to a request."
  @spec answer(t(), request()) :: answer()
  # The same, of which the front sends no body.
  def answer(core, %{method: "HEAD"} = request), do: answer(core, %{request | method: "GET"})

  def answer(core, request) do
    with :no <- open(core, request),
         {:ok, client} <- who(core, request.headers),
         {:ok, answer} <- route(core, client, request) do
      answer
    else
      {:error, refusal} -> Refusal.answer(refusal)
      open -> open
    end
  end

  # What needs no key: for those who look whether this server is there, and have none.
  defp open(_core, %{method: "GET", path: "/health"}),
    do: {200, [{"content-type", "text/plain"}], "ok\n"}

  defp open(%{metrics: true, metrics_without_key: true}, %{
         method: "GET",
         path: "/metrics"
       }),
       do: metrics()

  defp open(_core, _request), do: :no

  @doc """
  The answer to a request that will not be served whatever its body is, so that nobody needs to read it; nil
  for others.
  """
  @spec refused(t(), request()) :: answer() | nil
  # What needs no key is answered, whatever comes along.
  def refused(_core, %{method: method}) when method in ["GET", "HEAD"], do: nil

  def refused(core, request) do
    case who(core, request.headers) do
      {:ok, _client} -> nil
      {:error, refusal} -> Refusal.answer(refusal)
    end
  end

  @doc "Whose request it is, by its key."
  @spec who(t(), [{String.t(), String.t()}]) :: {:ok, client()} | {:error, Refusal.t()}
  def who(%{keys: nil} = core, _headers), do: {:ok, core.everybody}

  def who(%{keys: keys}, headers) do
    digest = :crypto.hash(:sha256, given_key(headers))

    # All of them are compared, so that the time tells nothing.
    case for {known, client} <- keys, :crypto.hash_equals(known, digest), do: client do
      [client | _] -> {:ok, client}
      [] -> {:error, Refusal.no_key()}
    end
  end

  defp given_key(headers) do
    case List.keyfind(headers, "authorization", 0) || List.keyfind(headers, "x-api-key", 0) do
      {"authorization", value} -> String.replace(value, ~r/\ABearer +/i, "")
      {"x-api-key", value} -> value
      nil -> ""
    end
  end

  @doc "The engines that are served now: those of the options, and those that were started over HTTP."
  @spec models(t()) :: [Models.entry()]
  def models(%{web: true} = core), do: core.models ++ Models.started()
  def models(core), do: core.models

  defp route(core, client, %{method: "GET", path: "/v1/models"}) do
    all = Models.all(models(core), core.timeout)
    models = for {name, about} <- all, allowed?(core, client, name), do: about
    {:ok, json(%{object: "list", data: models})}
  end

  defp route(core, client, %{method: "GET", path: "/v1/models/" <> name}) do
    name = decoded(name)

    case core |> models() |> Models.all(core.timeout) |> List.keyfind(name, 0) do
      {name, about} ->
        if allowed?(core, client, name),
          do: {:ok, json(about)},
          else: {:error, Refusal.no_model(name)}

      nil ->
        {:error, Refusal.no_model(name)}
    end
  end

  # They tell of every engine, also of those that a key of few models may not use.
  defp route(%{metrics: true} = core, client, %{method: "GET", path: "/metrics"})
       when client == core.everybody or client.allowed_models == nil,
       do: {:ok, metrics()}

  defp route(core, client, %{path: path} = request) do
    case {passed_on(core), request.method} do
      {%{^path => runner}, "POST"} ->
        pass_on(core, client, request, runner)

      {%{^path => _runner}, _method} ->
        {:error, Refusal.no_method("POST")}

      {_paths, method} ->
        if method != "GET" and path in own(core),
          do: {:error, Refusal.no_method("GET")},
          else: {:error, Refusal.no_path()}
    end
  end

  defp metrics, do: {200, [{"content-type", "text/plain; version=0.0.4"}], Metrics.text!()}

  # What is no encoding is no name.
  defp decoded(name) do
    URI.decode(name)
  rescue
    ArgumentError -> name
  end

  defp json(term), do: {200, [{"content-type", "application/json"}], JSON.encode(term)}

  defp allowed?(core, client, name) do
    Enum.all?([core.everybody, client], fn %{allowed_models: patterns} ->
      patterns == nil or AllowedModels.fits_any?(name, patterns)
    end)
  end

  defp pass_on(core, client, request, runner) do
    with {:ok, places} <- take_places(core, client),
         do: core |> ask(client, request, runner) |> leaving(places)
  end

  # All of it within the call's one deadline.
  defp ask(core, client, request, runner) do
    with {:ok, members} <- members(request.body),
         {:ok, name} <- name(core, members),
         call = call(core, members),
         {:ok, entry, lora} <- find(core, client, name, call),
         :ok <- check_runner(entry, name, runner) do
      case Exchange.request(entry.engine, params(request, name, entry, lora), call) do
        {:ok, {status, headers, body}} -> {:ok, answered(status, headers, body, name, request)}
        {:error, error} -> {:error, Refusal.of_error(error)}
      end
    end
  end

  defp members(body) do
    with :error <- Body.members(body, ["model" | @prompts]), do: {:error, Refusal.no_object()}
  end

  defp name(_core, %{"model" => "\"" <> _ = written}) do
    with :error <- Body.text(written), do: {:error, Refusal.no_object()}
  end

  # The only one there is may stay unnamed, whatever adapters and further names it has.
  defp name(core, _unnamed) do
    with [_only] = models <- models(core),
         [name | _names] <- Models.engines(models) do
      {:ok, name}
    else
      _none_or_more -> {:error, Refusal.unnamed()}
    end
  end

  defp find(core, client, name, call) do
    with true <- allowed?(core, client, name),
         timeout = Deadline.remaining(call.deadline),
         {:ok, entry, lora} <- Models.find(models(core), name, timeout) do
      {:ok, entry, lora}
    else
      {:error, error} -> {:error, Refusal.of_error(error)}
      _none -> {:error, Refusal.no_model(name)}
    end
  end

  defp check_runner(_entry, _name, :any), do: :ok

  defp check_runner(entry, name, runner) do
    if Models.runner(entry) in [nil, runner],
      do: :ok,
      else: {:error, Refusal.wrong_runner(name, runner)}
  end

  defp params(request, name, entry, lora) do
    headers = for {header, value} <- request.headers, header in @passed_on, do: [header, value]

    params = %{
      "method" => request.method,
      "path" => request.path,
      "query" => request.query,
      "headers" => headers,
      "body" => MessagePack.bin(request.body),
      "model" => name,
      "settings" => entry.settings
    }

    if lora, do: Map.put(params, "lora_request", Map.from_struct(lora)), else: params
  end

  defp call(core, members) do
    beginning = Enum.find_value(@prompts, &members[&1])
    session = beginning && binary_part(beginning, 0, min(byte_size(beginning), @beginning))

    Call.new(%{
      timeout: core.timeout,
      queue_timeout: core.queue_timeout,
      session: session,
      # A client sees nothing of a run that was lost before it gave anything.
      retry: true
    })
  end

  ## Answers

  # The app has no such route for what the engine does.
  defp answered(404, _headers, ~s({"detail":"Not Found"}), name, request),
    do: Refusal.answer(Refusal.not_done(name, request.path))

  defp answered(status, headers, body, _name, request) do
    headers = for {name, _} = header <- headers, name in @passed_back, do: header

    if is_binary(body),
      do: {status, headers, body},
      else: {status, headers, pieces(body, headers, request)}
  end

  # A stream of events ends with one that says what happened. Any other answer is not ended at all: its
  # client sees that it is not whole.
  defp pieces(body, headers, request) do
    events? = match?({_, "text/event-stream" <> _}, List.keyfind(headers, "content-type", 0))

    Stream.map(body, fn
      {:ok, piece} -> piece
      {:error, error} when events? -> error |> Refusal.of_error() |> Refusal.event(request.path)
      {:error, error} -> raise error
    end)
  end

  ## Limits

  defp take_places(core, client) do
    Enum.reduce_while([core.everybody, client] |> Enum.uniq(), {:ok, []}, fn who, {:ok, taken} ->
      case take_place(who) do
        {:ok, place} ->
          {:cont, {:ok, [place | taken]}}

        :none ->
          give_back(taken)
          {:halt, {:error, Refusal.too_many(who.max_concurrent_requests)}}
      end
    end)
  end

  defp take_place(%{max_concurrent_requests: nil}), do: {:ok, nil}

  defp take_place(%{id: id, max_concurrent_requests: count}), do: Places.take(id, count)

  defp give_back(places) do
    for place <- places, place != nil, do: Places.give_back(place)
    :ok
  end

  defp leaving({:ok, {status, headers, body}}, places) when not is_binary(body) do
    body = Stream.transform(body, fn -> nil end, &{[&1], &2}, fn _ -> give_back(places) end)
    {:ok, {status, headers, body}}
  end

  defp leaving(answer, places) do
    give_back(places)
    answer
  end
end
