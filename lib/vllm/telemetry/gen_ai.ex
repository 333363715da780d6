defmodule VLLM.Telemetry.GenAI do
  @moduledoc false
  # What OpenTelemetry's semantic conventions for generative AI call the parts of
  # a request, as attributes of its span. Texts are in none, stop sequences neither.

  alias VLLM.Error

  @type attributes :: %{atom() => String.t() | number() | boolean() | [String.t()]}

  # Sampling parameters by their names there.
  @parameters [
    {"max_tokens", :"gen_ai.request.max_tokens"},
    {"temperature", :"gen_ai.request.temperature"},
    {"top_p", :"gen_ai.request.top_p"},
    {"top_k", :"gen_ai.request.top_k"},
    {"frequency_penalty", :"gen_ai.request.frequency_penalty"},
    {"presence_penalty", :"gen_ai.request.presence_penalty"},
    {"seed", :"gen_ai.request.seed"},
    {"n", :"gen_ai.request.choice.count"}
  ]

  @doc """
  The attributes of a request, as far as they were given; `metadata` is that of its events.

      iex> metadata = %{method: "chat", model: "org/llama", stream?: true}
      iex> params = %{"sampling_params" => %{"temperature" => 0.0, "n" => 2}}
      iex> VLLM.Telemetry.GenAI.request(metadata, params)
      %{
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "org/llama",
        "gen_ai.request.stream": true,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.choice.count": 2
      }

      iex> metadata = %{method: "http_request", model: "org/llama", stream?: nil}
      iex> params = %{"path" => "/v1/chat/completions", "model" => "sql"}
      iex> VLLM.Telemetry.GenAI.request(metadata, params)
      %{
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "sql"
      }
  """
  @spec request(map(), map()) :: attributes()
  def request(%{method: method, model: model, stream?: stream?}, params) do
    given = params["sampling_params"] || %{}

    parameters =
      for {name, attribute} <- @parameters,
          value = given[name],
          is_number(value),
          {name, value} != {"n", 1},
          into: %{},
          do: {attribute, value}

    attributes =
      Map.merge(parameters, %{
        "gen_ai.operation.name": operation(method, params),
        "gen_ai.provider.name": "vllm",
        # A client over HTTP may have named an adapter.
        "gen_ai.request.model": params["model"] || model
      })

    if stream?, do: Map.put(attributes, :"gen_ai.request.stream", true), else: attributes
  end

  # The conventions have these names; for others it is one's own.
  defp operation("chat", _params), do: "chat"

  defp operation(method, _params) when method in ["generate", "beam_search"],
    do: "text_completion"

  defp operation("http_request", %{"path" => path}) do
    case path |> String.replace_prefix("/v1", "") |> String.trim_leading("/") do
      chat when chat in ["chat/completions", "responses", "messages"] -> "chat"
      "completions" -> "text_completion"
      other -> other
    end
  end

  defp operation("pool", %{"task" => "embed"}), do: "embeddings"
  defp operation("pool", %{"task" => task}) when is_binary(task), do: task
  defp operation(method, _params), do: method

  @doc """
  The attributes of what came of it: `result` as it travels, `figures` as in the measurements of a stop.

      iex> result = %{"request_id" => "7", "outputs" => [%{"finish_reason" => "length"}], "num_cached_tokens" => 2}
      iex> VLLM.Telemetry.GenAI.response(result, %{prompt_tokens: 5, completion_tokens: 16})
      %{
        "gen_ai.response.id": "7",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 16
      }
  """
  @spec response(term(), map()) :: attributes()
  def response(result, figures) do
    result = if is_map(result), do: result, else: %{}

    finished =
      for %{"finish_reason" => reason} <- List.wrap(result["outputs"]), reason, do: reason

    Map.reject(
      %{
        "gen_ai.response.id": result["request_id"],
        "gen_ai.response.finish_reasons": if(finished != [], do: finished),
        "gen_ai.usage.input_tokens": figures[:prompt_tokens],
        "gen_ai.usage.output_tokens": figures[:completion_tokens],
        "gen_ai.usage.cache_read.input_tokens": result["num_cached_tokens"]
      },
      fn {_attribute, value} -> is_nil(value) end
    )
  end

  @doc "The attribute of an error."
  @spec error(Error.t()) :: attributes()
  def error(error), do: %{"error.type": Atom.to_string(error.reason)}

  @doc "The attribute of a stream's first delta: after how many seconds it came, as its reader sees it."
  @spec first_token(integer()) :: attributes()
  def first_token(duration) do
    seconds = System.convert_time_unit(duration, :native, :microsecond) / 1_000_000
    %{"gen_ai.response.time_to_first_chunk": seconds}
  end
end
