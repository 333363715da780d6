defmodule VLLM.Bridge.Shape do
  @moduledoc false
  # Whether a worker's answer is of the shape that guides/protocol.md says, as far
  # as its reader depends on it: what fits can be made a struct without a crash.

  # A record is a map with at least these keys; {:maybe, _} stands for nil and a missing key too.
  @message {:record, %{"tool_calls" => {:list, :map}}}

  @completion {:record,
               %{
                 "token_ids" => :binary,
                 "logprobs" => {:maybe, :logprobs},
                 "message" => {:maybe, @message}
               }}

  @output {:record,
           %{
             "prompt_token_ids" => :binary,
             "prompt_logprobs" => {:maybe, :logprobs},
             "outputs" => {:list, @completion},
             "metrics" => {:maybe, :figures}
           }}

  # A result with outputs is a generation's.
  @pooled {:record,
           %{
             "prompt_token_ids" => :binary,
             "shape" => {:list, :natural},
             "data" => :binary,
             "outputs" => :absent
           }}

  @registered {:record,
               %{
                 "name" => :binary,
                 "aliases" => {:list, :binary},
                 "registered_at" => {:maybe, :time},
                 "last_used" => {:maybe, :time}
               }}

  @foreseen {:record, %{"outputs" => {:list, :map}, "together" => {:maybe, :map}}}

  @answers %{
    "hello" => :map,
    "load" => {:record, %{"max_num_seqs" => {:maybe, :natural}}},
    "engine_info" => :map,
    "generate" => @output,
    "chat" => @output,
    "beam_search" => @output,
    "pool" => :tensor,
    "score" => {:list, :score},
    "http_request" => :http_answer,
    "apply_chat_template" => {:record, %{"prompt_token_ids" => :binary}},
    "tokenize" => {:record, %{"token_ids" => :binary}},
    "detokenize" => {:record, %{"text" => :binary}},
    "list_loras" => {:list, :map},
    "metrics" => :map,
    "metric_families" =>
      {:list,
       {:record,
        %{"name" => :binary, "type" => :binary, "help" => :binary, "samples" => {:list, :sample}}}},
    "methods" => {:list, {:record, %{"formats" => {:list, :map}, "in_flight" => {:maybe, :map}}}},
    "detect" => {:record, %{"ignored" => {:list, :any}, "adapter" => {:maybe, :map}}},
    "check" => {:record, %{"findings" => {:list, :finding}}},
    "estimate" =>
      {:record,
       %{
         "weights" => :map,
         "kv_cache" => :map,
         "devices" => {:list, :map},
         "remedies" => {:list, :map},
         "formats" => {:list, :map}
       }},
    "recommend" =>
      {:record,
       %{
         "weights" => :map,
         "choices" => {:list, {:record, %{"reasons" => {:list, :any}, "ways" => {:list, :map}}}},
         "ruled_out" => {:list, :map},
         "notes" => {:list, :any}
       }},
    "packages" => :map,
    "pull" =>
      {:record,
       %{"path" => :binary, "repository" => {:maybe, :binary}, "commit" => {:maybe, :binary}}},
    "models" => {:list, {:record, %{"last_used" => :time}}},
    "delete" => {:record, %{"freed" => :natural}},
    "search" => {:list, :map},
    "registered" => {:list, @registered},
    "register" => @registered,
    "taken" =>
      {:list, {:record, %{"name" => :binary, "by" => :binary, "delete" => {:maybe, :binary}}}},
    "push" => {:record, %{"url" => :binary}},
    "prompts" => {:list, :map},
    "plot" => :binary,
    "unregister" => {:record, %{"freed" => :natural, "names" => {:list, :binary}}},
    "quantize_options" =>
      {:list,
       {:record,
        %{
          "format" => :binary,
          "types" => {:list, :binary},
          "options" => {:list, {:record, %{"name" => :binary, "types" => {:list, :binary}}}},
          "refused" => {:maybe, :binary}
        }}},
    "quantize_formats" =>
      {:list, {:record, %{"label" => :label, "format" => :binary, "options" => :map}}},
    "plan_quantize" => @foreseen,
    "check_finetune" => @foreseen,
    "quantize" =>
      {:record,
       %{
         "options" => :map,
         "libraries" => :map,
         "calibration" => {:maybe, :map},
         "notes" => {:maybe, {:list, :binary}},
         "files" => :map,
         "bytes" => :natural,
         "peak_memory_bytes" => {:maybe, :natural}
       }},
    "measure" => :map,
    "compare" => {:list, :map},
    "workspace" => {:record, %{"path" => :binary}}
  }

  @doc "Whether `result` can be the answer to a request of `method`."
  @spec answer?(String.t(), term()) :: boolean()
  def answer?(method, result), do: fits?(result, Map.get(@answers, method, :any))

  @doc "Whether `row`, without its id, can be a delta."
  @spec delta?(term()) :: boolean()
  def delta?([_index, _text, token_ids, logprobs, _finish_reason, _stop_reason | message]) do
    fits?(token_ids, {:maybe, :binary}) and fits?(logprobs, {:maybe, :logprobs}) and
      (message == [] or (match?([_], message) and fits?(hd(message), @message)))
  end

  def delta?(_row), do: false

  @doc "Whether `row`, without its id, can be a delta of an answer over HTTP: its head, or a piece of its body."
  @spec http_delta?(term()) :: boolean()
  def http_delta?([piece]), do: is_binary(piece)
  def http_delta?([status, headers]), do: head?(status, headers)
  def http_delta?(_row), do: false

  defp head?(status, headers) do
    status in 200..599 and is_list(headers) and
      Enum.all?(headers, &match?([name, value] when is_binary(name) and is_binary(value), &1))
  end

  defp fits?(_value, :any), do: true
  defp fits?(value, :absent), do: is_nil(value)
  defp fits?(value, {:maybe, shape}), do: is_nil(value) or fits?(value, shape)
  defp fits?(value, :binary), do: is_binary(value)
  defp fits?(value, :natural), do: is_integer(value) and value >= 0
  # Seconds since 1970, until the last year that a `DateTime` has.
  defp fits?(value, :time), do: is_number(value) and value >= 0 and value < 253_402_300_800

  # What becomes the name of a folder.
  defp fits?(value, :label), do: is_binary(value) and value =~ ~r/\A[A-Za-z0-9][\w.+-]{0,95}\z/

  # Timestamps and extensions are structs.
  defp fits?(value, :map), do: is_map(value) and not is_struct(value)
  defp fits?(value, {:list, shape}), do: is_list(value) and Enum.all?(value, &fits?(&1, shape))

  defp fits?(value, {:record, fields}) do
    fits?(value, :map) and Enum.all?(fields, fn {name, shape} -> fits?(value[name], shape) end)
  end

  @texts ~w(reason message remedy)
  defp fits?(value, :finding) do
    fits?(value, :map) and value["severity"] in ~w(error warning info) and
      Enum.all?(@texts, &is_binary(value[&1]))
  end

  defp fits?(value, :http_answer) do
    fits?(value, {:record, %{"body" => :binary}}) and head?(value["status"], value["headers"])
  end

  # The figures that telemetry calculates with: seconds and counts.
  @figures ~w(queued_ts scheduled_ts first_token_ts last_token_ts first_token_latency
              num_generation_tokens)
  defp fits?(value, :figures) do
    fits?(value, :map) and Enum.all?(@figures, &figure?(Map.get(value, &1, 0)))
  end

  # Erlang has atoms for the numbers that are none.
  defp fits?([name, labels, value], :sample) do
    is_binary(name) and fits?(labels, :map) and (is_number(value) or is_atom(value)) and
      Enum.all?(labels, fn {name, value} -> is_binary(name) and is_binary(value) end)
  end

  defp fits?(_value, :sample), do: false

  defp fits?(value, :tensor) do
    fits?(value, @pooled) and byte_size(value["data"]) == 4 * Enum.product(value["shape"])
  end

  defp fits?(value, :score), do: fits?(value, :tensor) and byte_size(value["data"]) == 4

  # All columns have the same length, and the counts add up to it.
  defp fits?(value, :logprobs) do
    with %{"counts" => counts, "token_ids" => ids, "logprobs" => logprobs} <- value,
         %{"ranks" => ranks, "tokens" => tokens} when is_list(tokens) <- value,
         true <- Enum.all?([counts, ids, logprobs, ranks], &is_binary/1) do
      size = 4 * length(tokens)

      Enum.all?([ids, logprobs, ranks], &(byte_size(&1) == size)) and
        rem(byte_size(counts), 4) == 0 and 4 * sum(counts, 0) == size
    else
      _ -> false
    end
  end

  @none 0xFFFFFFFF
  defp sum(<<@none::32-little, counts::binary>>, sum), do: sum(counts, sum)
  defp sum(<<count::32-little, counts::binary>>, sum), do: sum(counts, sum + count)
  defp sum(<<>>, sum), do: sum

  defp figure?(number), do: is_number(number) and abs(number) < 1.0e15
end
