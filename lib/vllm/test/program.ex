defmodule VLLM.Test.Program do
  @moduledoc false
  # A process that stands in for the port of a worker program: it is sent frames
  # (see VLLM.Bridge.Writer), sends its owner what the port would, and answers
  # from a script. It speaks the protocol of guides/protocol.md, so that all
  # that is in front of the program is at work.
  #
  # The record of what was asked is in the engine's table: it outlives a program
  # that dies, and the programs of all workers share it.

  use GenServer

  alias VLLM.Bridge.{Frames, MessagePack, Program}
  alias VLLM.{ChatMessage, EngineInfo, Error, Test, TokenIds}
  alias VLLM.Engine.Table
  alias VLLM.Test.{Reply, Request}

  # What is not answered by the script.
  @unscripted ~w(hello load engine_info apply_chat_template tokenize detokenize reset_prefix_cache
             reset_mm_cache reset_encoder_cache sleep wake_up health metrics metric_families
             list_loras prepare_http)

  # What is: deltas that are texts, and what comes of them, belong to these alone.
  @scripted ~w(generate beam_search chat pool score)

  @doc "Starts a program for the calling process, which is its owner."
  @spec start(Table.t(), Test.script()) :: {:ok, Program.t()}
  def start(table, script) do
    {:ok, pid} = GenServer.start_link(__MODULE__, {self(), table, script})
    # This folder is never created, and no process has the pid 0.
    run_dir = Path.join(Program.base_dir(), Base.url_encode64(:rand.bytes(9)))
    {:ok, %Program{port: pid, os_pid: 0, run_dir: run_dir, python: ""}}
  end

  @doc "What the programs of an engine were asked, in order."
  @spec requests(Table.t()) :: [Request.t()]
  def requests(table) do
    table
    |> :ets.select([{{{:asked, :"$1"}, :"$2"}, [], [{{:"$1", :"$2"}}]}])
    |> Enum.sort_by(&elem(&1, 0))
    |> Enum.map(&elem(&1, 1))
  end

  @impl true
  def init({owner, table, script}) do
    {:ok, %{owner: owner, table: table, script: script, info: %{}, loras: %{}, jobs: %{}}}
  end

  @impl true
  def handle_info({:frame, frame}, state) do
    {:ok, message} = frame |> IO.iodata_to_binary() |> MessagePack.decode()
    receive_message(message, state)
  end

  def handle_info({:go_on, id}, %{jobs: jobs} = state) when is_map_key(jobs, id) do
    advance(id, update_in(state.jobs[id].steps, &tl/1))
  end

  # Of a request that was cancelled meanwhile.
  def handle_info({:go_on, _id}, state), do: {:noreply, state}

  # What the script says, from the process that asked it.
  def handle_info({{:script, id}, _monitor, :process, _pid, reason}, %{jobs: jobs} = state)
      when is_map_key(jobs, id) do
    steps =
      case reason do
        {:steps, steps} -> for_each_completion(steps, jobs[id].count)
        failure -> [{:error, Error.new(:internal, "The script failed: #{describe(failure)}")}]
      end

    advance(id, put_in(state.jobs[id].steps, steps))
  end

  def handle_info({{:script, _id}, _monitor, :process, _pid, _reason}, state) do
    {:noreply, state}
  end

  # However it ends, its owner gets an exit status, as from a port.
  @impl true
  def terminate(_reason, state) do
    for {_id, job} <- state.jobs, do: Process.exit(job.pid, :kill)
    send(state.owner, {self(), {:exit_status, 1}})
  end

  defp receive_message([0, id, "load", params], state) do
    info = info(params)
    respond(state, id, {:ok, info})
    {:noreply, %{state | info: info}}
  end

  defp receive_message([0, id, "load_lora", %{"lora_request" => lora}], state) do
    respond(state, id, {:ok, nil})
    {:noreply, put_in(state.loras[lora["lora_name"]], lora)}
  end

  defp receive_message([0, id, "unload_lora", %{"lora_name" => name}], state) do
    respond(state, id, {:ok, is_map_key(state.loras, name)})
    {:noreply, update_in(state.loras, &Map.delete(&1, name))}
  end

  defp receive_message([0, id, method, params], state) when method in @unscripted do
    respond(state, id, unscripted(method, params, state))
    {:noreply, state}
  end

  defp receive_message([0, id, method, params], state) do
    request = Request.from_wire(method, params)
    number = :ets.update_counter(state.table, :asked, 1, {:asked, 0})
    :ets.insert(state.table, {{:asked, number}, request})

    # In a process of its own, because a script's function may fail or block.
    {pid, _monitor} =
      :erlang.spawn_opt(
        fn -> exit({:steps, state.script |> choose(request, number) |> steps(request)}) end,
        monitor: [tag: {:script, id}]
      )

    job = %{
      request: request,
      pid: pid,
      count: completions(params),
      # Without credit it is no stream.
      credit: if(method in @scripted, do: params["credit"]),
      steps: [:waiting],
      texts: %{}
    }

    {:noreply, put_in(state.jobs[id], job)}
  end

  defp receive_message([2, "cancel", %{"id" => id}], %{jobs: jobs} = state)
       when is_map_key(jobs, id) do
    Process.exit(jobs[id].pid, :kill)
    finish(id, {:error, Error.new(:aborted, "The request was cancelled.")}, state)
  end

  defp receive_message([2, "credit", %{"id" => id, "count" => count}], %{jobs: jobs} = state)
       when is_map_key(jobs, id) do
    advance(id, update_in(state.jobs[id].credit, &(&1 && &1 + count)))
  end

  # A script may take as long as it likes: nothing counts as unfinished.
  defp receive_message([2, "ping", %{"n" => n}], state) do
    pong = %{"n" => n, "steps" => 0, "beats" => 0, "unfinished" => 0}
    write(state, MessagePack.encode!([2, "pong", pong]))
    {:noreply, state}
  end

  defp receive_message([2, "shutdown", _params], state), do: {:stop, :normal, state}
  # For a request that has ended.
  defp receive_message([2, _method, _params], state), do: {:noreply, state}

  ## The script

  defp choose(replies, _request, number) when is_list(replies),
    do: replies |> Enum.drop(number - 1) |> List.first(:none)

  defp choose(replies, request, _number) when is_map(replies) and not is_struct(replies),
    do: Map.get(replies, request.prompt, :none)

  defp choose(script, _request, _number), do: script

  defp steps(function, request) when is_function(function, 1),
    do: Reply.steps(function.(request))

  defp steps(:none, request) do
    Reply.steps(
      {:error, :unsupported,
       "The script has no reply to #{inspect(request.prompt || request.params)}."}
    )
  end

  defp steps(reply, _request), do: Reply.steps(reply)

  defp describe({%{__exception__: true} = error, _stacktrace}),
    do: Exception.format_banner(:error, error)

  defp describe({{:nocatch, value}, _stacktrace}), do: Exception.format_banner(:throw, value)
  defp describe(reason), do: Exception.format_exit(reason)

  ## Requests under way

  defp completions(%{"beam_search_params" => %{"beam_width" => count}}), do: at_least_one(count)
  defp completions(%{"sampling_params" => %{"n" => count}}), do: at_least_one(count)
  defp completions(_params), do: 1

  defp at_least_one(count), do: if(is_integer(count) and count > 0, do: count, else: 1)

  # Each of several completions says the same.
  defp for_each_completion(steps, count) do
    Enum.flat_map(steps, fn
      {:text, text} -> for index <- 0..(count - 1), do: {:text, text, index}
      step -> [step]
    end)
  end

  defp advance(id, state) do
    job = state.jobs[id]

    case job.steps do
      # Its reader has to take some first.
      [{:text, _text, _index} | _] when job.credit == 0 ->
        {:noreply, state}

      [{:text, text, index} | steps] ->
        if job.credit, do: send_delta(state, id, index, text, ending(steps, index))
        texts = Map.update(job.texts, index, text, &(&1 <> text))
        credit = job.credit && job.credit - 1
        advance(id, put_in(state.jobs[id], %{job | steps: steps, texts: texts, credit: credit}))

      [{:wait, ms} | steps] ->
        Process.send_after(self(), {:go_on, id}, ms)
        {:noreply, put_in(state.jobs[id].steps, [:waiting | steps])}

      [{:done, done}] ->
        finish(id, result(id, job, done), state)

      [{:error, error}] ->
        finish(id, {:error, error}, state)

      [:die] ->
        {:stop, :normal, state}

      # For a cancel, a timer or the script.
      [still | _] when still in [:waiting, :hang] ->
        {:noreply, state}
    end
  end

  # The completion of which nothing more comes, else nil.
  defp ending([{:done, done}], _index), do: done

  defp ending([{:text, _text, other} | steps], index) when other != index,
    do: ending(steps, index)

  defp ending(_steps, _index), do: nil

  defp finish(id, answer, state) do
    respond(state, id, answer)
    {:noreply, update_in(state.jobs, &Map.delete(&1, id))}
  end

  defp result(id, %{request: %{method: "pool"} = request}, {:numbers, numbers}),
    do: {:ok, pooled(id, request, numbers)}

  defp result(id, %{request: %{method: "score"} = request}, {:numbers, numbers}),
    do: {:ok, Enum.map(numbers, &pooled(id, request, [&1]))}

  defp result(id, %{request: %{method: method} = request, texts: texts}, %{} = done)
       when method in ["generate", "beam_search", "chat"] do
    {:ok,
     %{
       "request_id" => "script-#{id}",
       "prompt" => if(request.messages, do: render(request.messages), else: request.prompt),
       "prompt_token_ids" => prompt_tokens(request),
       "prompt_logprobs" => nil,
       "outputs" => for({index, text} <- Enum.sort(texts), do: completion(index, text, done)),
       "finished" => true,
       "num_cached_tokens" => 0,
       "metrics" => nil
     }
     |> with_messages(request, done)}
  end

  defp result(_id, %{request: %{method: method}}, done)
       when method in @scripted do
    kind = if is_struct(done), do: "a text", else: "numbers"

    {:error,
     Error.new(
       :unsupported,
       "The script has #{kind} for a request that wants none (`#{method}`)."
     )}
  end

  defp result(_id, %{request: %{method: method}}, _done),
    do: {:error, Error.new(:unsupported, "Engines of VLLM.Test do not answer `#{method}`.")}

  defp pooled(id, request, numbers) do
    %{
      "request_id" => "script-#{id}",
      "prompt_token_ids" => prompt_tokens(request),
      "num_cached_tokens" => 0,
      "shape" => [length(numbers)],
      "data" =>
        MessagePack.bin(for number <- numbers, into: <<>>, do: <<number::32-float-little>>)
    }
  end

  defp completion(index, text, done) do
    %{
      "index" => index,
      "text" => text,
      "token_ids" => tokens(text),
      "cumulative_logprob" => done.cumulative_logprob,
      "logprobs" => nil,
      "finish_reason" => done.finish_reason,
      "stop_reason" => done.stop_reason,
      "parsed" => done.parsed
    }
  end

  defp with_messages(output, %{method: "chat"}, done) do
    Map.update!(output, "outputs", fn outputs ->
      for output <- outputs, do: Map.put(output, "message", message(done.message, output["text"]))
    end)
  end

  defp with_messages(output, _request, _done), do: output

  defp message(nil, text) do
    %{"role" => "assistant", "content" => text, "reasoning" => nil, "tool_calls" => []}
  end

  defp message(message, _text) do
    %{
      "role" => message.role,
      "content" => message.content,
      "reasoning" => message.reasoning,
      "tool_calls" =>
        for call <- message.tool_calls do
          %{
            "id" => call.id,
            "name" => call.name,
            "arguments" => call.arguments,
            "parsed" => call.parsed
          }
        end
    }
  end

  ## What needs no script

  @names for name <- Map.keys(%EngineInfo{}), name != :__struct__, do: Atom.to_string(name)

  # What the options say of the engine, and of the rest something that fits.
  defp info(%{"model" => model, "options" => options}) do
    Map.merge(
      %{
        "model" => model,
        "dtype" => "auto",
        "kv_cache_dtype" => "auto",
        "max_model_len" => 4096,
        "max_num_seqs" => 256,
        "tensor_parallel_size" => 1,
        "pipeline_parallel_size" => 1,
        "distributed_executor_backend" => "uni",
        "data_parallel_size" => 1,
        "vllm_version" => VLLM.Python.vllm_version(),
        "device" => "script",
        "runner" => "generate",
        "tasks" => ["generate"],
        "load_seconds" => 0.0
      },
      Map.take(options, @names)
    )
  end

  defp unscripted("hello", params, _state), do: {:ok, %{"protocol" => params["protocol"]}}
  defp unscripted("engine_info", _params, state), do: {:ok, state.info}
  defp unscripted("list_loras", _params, state), do: {:ok, Map.values(state.loras)}

  defp unscripted("apply_chat_template", %{"messages" => messages}, _state) do
    text = render(messages)
    {:ok, %{"prompt" => text, "prompt_token_ids" => tokens(text)}}
  end

  defp unscripted("tokenize", %{"text" => text}, _state),
    do: {:ok, %{"token_ids" => tokens(text)}}

  defp unscripted("detokenize", %{"token_ids" => bytes}, _state) do
    case :unicode.characters_to_binary(TokenIds.unpack(bytes)) do
      text when is_binary(text) -> {:ok, %{"text" => text}}
      _ -> {:error, Error.new(:invalid_option, "A token id is no character's code point.")}
    end
  end

  defp unscripted("metrics", _params, state) do
    {:ok, %{"num_requests_running" => map_size(state.jobs), "num_requests_waiting" => 0}}
  end

  defp unscripted("metric_families", params, state) do
    {:ok, figures} = unscripted("metrics", params, state)
    labels = %{"model_name" => state.info["model"], "engine" => "0"}

    {:ok,
     for {name, value} <- Enum.sort(figures) do
       name = "vllm:" <> name
       help = "As vLLM counts it."
       %{"name" => name, "type" => "gauge", "help" => help, "samples" => [[name, labels, value]]}
     end}
  end

  defp unscripted(_nothing_to_say, _params, _state), do: {:ok, nil}

  defp render(messages) do
    Enum.map_join(messages, "\n", fn %{"role" => role} = message ->
      content = message["content"]
      "#{role}: #{if is_binary(content), do: content, else: inspect(content)}"
    end)
  end

  # A character is a token.
  defp tokens(text) do
    MessagePack.bin(for <<character::utf8 <- text>>, into: <<>>, do: <<character::32-little>>)
  end

  defp prompt_tokens(%{prompt_token_ids: ids}) when is_list(ids),
    do: MessagePack.bin(for id <- ids, into: <<>>, do: <<id::32-little>>)

  defp prompt_tokens(%{messages: [_ | _] = messages}), do: messages |> render() |> tokens()
  defp prompt_tokens(request), do: tokens(request.prompt || "")

  ## Frames

  defp send_delta(state, id, index, text, done) do
    row = [
      id,
      index,
      text,
      tokens(text),
      nil,
      done && done.finish_reason,
      done && done.stop_reason
    ]

    row = if state.jobs[id].request.messages, do: row ++ [message_delta(done, text)], else: row
    write(state, MessagePack.encode!([2, "deltas", %{"deltas" => [row]}]))
  end

  # What is not said comes at once, in the end.
  defp message_delta(%{message: %ChatMessage{} = message}, text) do
    calls =
      for {call, index} <- Enum.with_index(message.tool_calls) do
        %{"index" => index, "id" => call.id, "name" => call.name, "arguments" => call.arguments}
      end

    %{"content" => text, "reasoning" => message.reasoning || "", "tool_calls" => calls}
  end

  defp message_delta(_done, text),
    do: %{"content" => text, "reasoning" => "", "tool_calls" => []}

  defp respond(state, id, answer) do
    case MessagePack.encode(response(id, answer)) do
      {:ok, frame} ->
        write(state, frame)

      {:error, reason} ->
        message = "The script's reply cannot be sent: #{MessagePack.format_error(reason)}."
        respond(state, id, {:error, Error.new(:internal, message)})
    end
  end

  defp response(id, {:ok, result}), do: [1, id, nil, result]

  defp response(id, {:error, error}) do
    details = %{"message" => error.message, "details" => error.details}
    [1, id, Map.put(details, "reason", Atom.to_string(error.reason)), nil]
  end

  defp write(state, frame) do
    send(state.owner, {self(), {:data, frame |> Frames.wrap() |> IO.iodata_to_binary()}})
  end
end
