defmodule VLLM.Web.Routes do
  @moduledoc false
  # All that the admin API has, each declared once: it is found, checked, described
  # and, in a test that walks all of it, refused by this table.

  alias VLLM.Web.{Engines, Events, Jobs, Models, Push, Schemas}

  @typedoc """
  What is served at a path: `run` is asked with what comes, or nil where it is the description itself. `{name}` is a
  part of the path, `{name...}` all the rest of it.
  """
  @type route :: %{
          method: String.t(),
          path: String.t(),
          about: String.t(),
          run: (asked() -> result()) | :describe,
          query: %{atom() => map()},
          body: map() | nil,
          status: 200..204,
          answer: atom() | nil
        }

  @typedoc "What a request asks, checked by the schemas of its route."
  @type asked :: %{
          core: VLLM.OpenAI.t(),
          params: %{String.t() => String.t()},
          query: %{String.t() => term()},
          body: %{String.t() => term()}
        }

  @typedoc "What comes of it; `:none` where there is no engine of that id."
  @type result ::
          {:ok, term()} | :ok | {:events, Enumerable.t()} | :none | {:error, VLLM.Error.t()}

  @doc "The table."
  @spec all() :: [route()]
  def all do
    [
      get("/openapi.json", :describe, :Description, "This description."),
      get("/engines", &Engines.list/1, :Engines, "The engines of this node."),
      post("/engines", &Engines.start/1, :Engine, "Starts an engine, which goes on loading.",
        body: :Start,
        status: 202
      ),
      get("/engines/{id}", &Engines.get/1, :Engine, "An engine."),
      operation(
        "stop",
        &Engines.stop/1,
        "Stops an engine, once its requests have ended.",
        :Nothing
      ),
      operation(
        "drain",
        &Engines.drain/1,
        "Takes replicas out of service, once their requests have ended.",
        :Which
      ),
      operation("resume", &Engines.resume/1, "Brings replicas back that were drained.", :Which),
      operation(
        "restart",
        &Engines.restart/1,
        "Starts replicas anew, once their requests have ended.",
        :Which
      ),
      operation(
        "reload",
        &Engines.reload/1,
        "Gives an engine new options while it serves.",
        :Reload
      ),
      operation("scale", &Engines.scale/1, "Gives an engine so many replicas.", :Scale),
      get(
        "/engines/{id}/log",
        &Engines.log/1,
        :Lines,
        "The last lines that the processes of an engine have printed.",
        query: Schemas.lines()
      ),
      get(
        "/events",
        &Events.stream/1,
        nil,
        "Engines, jobs and the machine as they are, once a second, as events (`state`)."
      ),
      post(
        "/models/check",
        &Models.check/1,
        :Report,
        "Whether a model would run with these options.",
        body: :Question
      ),
      post("/models/estimate", &Models.estimate/1, :Estimate, "How much memory a model takes.",
        body: :Question
      ),
      get("/models", &Models.list/1, :Models, "The models and adapters of this machine."),
      delete("/models/{name...}", &Models.delete/1, :Freed, "Deletes a model or an adapter.",
        query: Schemas.files()
      ),
      post(
        "/models/push",
        &Push.stream/1,
        nil,
        "Uploads a model or an adapter to the hub, which is told as events (`progress`, then `done` or `error`); " <>
          "it ends with whoever reads them.",
        body: :Push
      ),
      get(
        "/quantize/options",
        &Jobs.formats/1,
        :Formats,
        "What models can be made in, with the options of each."
      ),
      post("/quantize/estimate", &Jobs.estimate/1, :JobEstimate, "What a job would take.",
        body: :Quantize
      ),
      post(
        "/quantize/compare",
        &Models.compare/1,
        :Comparison,
        "What models lost that were made of another: it takes minutes.",
        body: :Compare
      ),
      get(
        "/quantize/jobs",
        &Jobs.list/1,
        :Jobs,
        "All jobs, those first that were asked for last."
      ),
      post(
        "/quantize/jobs",
        &Jobs.start/1,
        :Job,
        "Starts a job that makes a model in other formats.",
        body: :Quantize,
        status: 201
      ),
      get("/quantize/jobs/{id}", &Jobs.get/1, :Job, "A job."),
      post(
        "/quantize/jobs/{id}/cancel",
        &Jobs.cancel/1,
        :Job,
        "Ends a job; what is finished stays.",
        body: :Nothing
      ),
      post(
        "/quantize/jobs/{id}/retry",
        &Jobs.retry/1,
        :Job,
        "Goes on with a job that has ended without all of its outputs.",
        body: :Nothing
      ),
      delete("/quantize/jobs/{id}", &Jobs.delete/1, nil, "Deletes a job that has ended.",
        query: Schemas.outputs(),
        status: 204
      ),
      get(
        "/quantize/jobs/{id}/log",
        &Jobs.log/1,
        :Lines,
        "What the processes of a job have printed."
      )
    ]
  end

  defp get(path, run, answer, about, options \\ []),
    do: route("GET", path, run, answer, about, options)

  defp post(path, run, answer, about, options),
    do: route("POST", path, run, answer, about, options)

  defp delete(path, run, answer, about, options),
    do: route("DELETE", path, run, answer, about, options)

  # What takes long is answered when it has begun.
  defp operation(name, run, about, body),
    do: post("/engines/{id}/#{name}", run, :Engine, about, body: body, status: 202)

  defp route(method, path, run, answer, about, options) do
    %{
      method: method,
      path: "/api/v1" <> path,
      run: run,
      about: about,
      answer: answer,
      query: options[:query] || %{},
      body: options[:body] && Schemas.body(options[:body]),
      status: options[:status] || 200
    }
  end

  @doc "The routes of a path, each with the parts of it that they name; one for each method."
  @spec match(String.t()) :: [{route(), %{String.t() => String.t()}}]
  def match(path) do
    parts = path |> String.split("/") |> Enum.map(&decoded/1)

    for route <- all(),
        params = params(String.split(route.path, "/"), parts, %{}),
        do: {route, params}
  end

  defp params([], [], params), do: params

  defp params([pattern | patterns], [part | parts], params) do
    case Regex.run(~r/\A\{(\w+)(\.\.\.)?\}\z/, pattern) do
      nil -> if pattern == part, do: params(patterns, parts, params)
      [_, _name | _] when part == "" -> nil
      [_, name] -> params(patterns, parts, Map.put(params, name, part))
      # A server may have decoded the slashes of a name.
      [_, name, _rest] -> Map.put(params, name, Enum.join([part | parts], "/"))
    end
  end

  defp params(_patterns, _parts, _params), do: nil

  # What is no encoding of a text is no part of a path.
  defp decoded(part) do
    text = URI.decode(part)
    if String.valid?(text), do: text, else: ""
  end
end
