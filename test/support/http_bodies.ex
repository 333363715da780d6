defmodule VLLM.HTTPBodies do
  @moduledoc """
  Requests for the paths of OpenAI's API whose options are given any values: right ones, wrong ones, far too large
  ones; and what a server says to them. Draws from `:rand` of the calling process, so that its seed gives the
  same requests again.
  """

  alias VLLM.{HTTPClient, JSON}

  @messages [%{"role" => "user", "content" => "Hello!"}]
  @weather %{"name" => "weather", "parameters" => %{"type" => "object"}}
  @tools [%{"type" => "function", "function" => @weather}]
  @schema %{"type" => "json_schema", "json_schema" => %{"name" => "a", "schema" => %{}}}

  # What each path takes at least.
  @bodies %{
    "generate" => %{
      "/v1/completions" => %{"prompt" => "Hello!"},
      "/v1/chat/completions" => %{"messages" => @messages},
      "/v1/responses" => %{"input" => "Hello!"},
      "/v1/messages" => %{"messages" => @messages, "max_tokens" => 4},
      "/v1/messages/count_tokens" => %{"messages" => @messages},
      "/tokenize" => %{"prompt" => "Hello!"},
      "/detokenize" => %{"tokens" => [1, 2]}
    },
    "embed" => %{
      "/v1/embeddings" => %{"input" => "Hello!"},
      "/score" => %{"text_1" => "Hello!", "text_2" => ["Hello!", "Good bye!"]},
      "/v2/rerank" => %{"query" => "Hello!", "documents" => ["Hello!", "Good bye!"]},
      "/tokenize" => %{"prompt" => "Hello!"}
    }
  }

  @options ~w(max_tokens max_completion_tokens max_output_tokens n best_of temperature top_p top_k min_p seed stop) ++
             ~w(stop_token_ids logit_bias logprobs top_logprobs prompt_logprobs echo stream stream_options suffix) ++
             ~w(presence_penalty repetition_penalty min_tokens ignore_eos bad_words allowed_token_ids priority) ++
             ~w(response_format structured_outputs tools tool_choice parallel_tool_calls chat_template) ++
             ~w(chat_template_kwargs add_generation_prompt continue_final_message documents system user) ++
             ~w(previous_response_id store background include instructions reasoning text truncation) ++
             ~w(truncate_prompt_tokens dimensions encoding_format top_n add_special_tokens return_token_ids) ++
             ~w(prompt input messages tokens query text_1 text_2 model request_id cache_salt kv_transfer_params) ++
             ~w(use_beam_search length_penalty skip_special_tokens detokenize vllm_xargs prompt_embeds)

  @values [
            nil,
            true,
            false,
            0,
            1,
            2,
            -1,
            3.5,
            -1.0e-9,
            1.0e308,
            2_147_483_648,
            9_223_372_036_854_775_808
          ] ++
            [
              "",
              " ",
              "a",
              "auto",
              "required",
              "none",
              "low",
              "float",
              "base64",
              "text",
              "../../etc/passwd"
            ] ++
            [
              "{{ 1 / 0 }}",
              "{% for i in range(9) %}a{% endfor %}",
              "\0",
              "\u{FFFF}",
              "é🙂",
              "1" <> "0"
            ] ++
            [
              [],
              [[]],
              [0],
              [-1],
              [1, 2, 3],
              [4_000_000_000],
              ["a"],
              [nil],
              [%{}],
              %{},
              %{"a" => %{"b" => []}}
            ] ++
            [
              %{"1" => 100},
              %{"-1" => "a"},
              %{"type" => "json_object"},
              %{"type" => "none"},
              @schema,
              @tools
            ] ++
            [
              %{"include_usage" => true},
              %{"regex" => "[a-"},
              %{"regex" => "a{2}"},
              %{"json" => %{"type" => 1}}
            ] ++
            [
              %{"grammar" => "root ::="},
              %{"choice" => []},
              @messages,
              [%{"role" => "tool", "content" => [1]}]
            ] ++
            [
              %{"type" => "function", "function" => %{"name" => "weather"}},
              %{"type" => "function", "name" => 1}
            ]

  @doc """
  Asks a server of this machine, with this key, so many requests for the model `fuzzed`, which does what `runner` says,
  some at once: how often each status came, and the requests that got a fault, or `:none`, which is that no
  answer came for `patience` ms.
  """
  @spec ask(:inet.port_number(), String.t(), String.t(), pos_integer(), timeout()) ::
          {%{status => pos_integer()}, [{status, {path :: String.t(), body :: binary()}}]}
        when status: 100..599 | :none
  def ask(port, key, runner, count, patience) do
    answered =
      for(_ <- 1..count, do: request(runner))
      |> Task.async_stream(&{status(port, key, &1, patience), &1},
        max_concurrency: 16,
        timeout: :infinity
      )
      |> Enum.map(fn {:ok, answered} -> answered end)

    faults = for {status, _} = fault <- answered, status == :none or status >= 500, do: fault
    {Enum.frequencies_by(answered, &elem(&1, 0)), faults}
  end

  defp request(runner) do
    {path, body} = Enum.random(@bodies[runner])
    # Nobody waits for long texts.
    least = Map.merge(%{"model" => "fuzzed", "max_tokens" => 4}, body)
    given = for _ <- 1..:rand.uniform(4), into: %{}, do: {Enum.random(@options), value()}
    {path, least |> Map.merge(given) |> JSON.encode() |> IO.iodata_to_binary() |> spoilt()}
  end

  defp value do
    case :rand.uniform(20) do
      1 -> Enum.reduce(1..200, "deep", fn _, inner -> [inner] end)
      2 -> String.duplicate("Hello! ", 2_000)
      _ -> Enum.random(@values)
    end
  end

  # What is no JSON, or holds half a character.
  defp spoilt(body) do
    case :rand.uniform(20) do
      1 -> binary_part(body, 0, :rand.uniform(byte_size(body)) - 1)
      2 -> String.replace(body, "Hello!", "\\ud800")
      3 -> body <> <<0xFF>>
      _ -> body
    end
  end

  defp status(port, key, {path, body}, patience) do
    headers = ["authorization: Bearer #{key}", "connection: close"]
    socket = port |> HTTPClient.connect() |> HTTPClient.post(path, body, headers)
    said = whole(socket, patience, "")
    :gen_tcp.close(socket)
    said
  end

  defp whole(socket, patience, said) do
    case :gen_tcp.recv(socket, 0, patience) do
      {:ok, more} -> whole(socket, patience, said <> more)
      {:error, :closed} -> of(said)
      {:error, :timeout} -> :none
    end
  end

  # A stream may end with a fault after a good beginning.
  defp of("HTTP/1.1 " <> <<status::binary-size(3)>> <> said) do
    case Regex.run(~r/"code": ?(5\d\d)/, said) do
      [_, code] -> String.to_integer(code)
      nil -> String.to_integer(status)
    end
  end
end
